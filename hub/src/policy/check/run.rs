//! Runs OPA with limits on time, memory and output.

use std::convert::Infallible;
use std::num::NonZero;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, prlimit, setpriority_process};
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;

use crate::policy::check::Error;

/// Maximum output bytes of one OPA run. Diagnostics quote whole lines.
pub(super) const CHECK_OUTPUT_MAX: u64 = 128 << 20;

/// Maximum memory, in bytes. A rule with 30,000 definitions needs 350 MB to plan.
const MEMORY_MAX: u64 = 1 << 30;
/// Soft limit of Go's heap: 3/4 of [`MEMORY_MAX`].
const GO_MEMORY_LIMIT: &str = "768MiB";
/// Maximum number of threads. Each stack uses 8 MB of [`MEMORY_MAX`].
const THREADS_MAX: u64 = 8;
/// Time until the priority is lowered; a hundred modules take 0.1 s.
const LOWER_PRIORITY_AFTER: Duration = Duration::from_secs(1);
/// Lowered priority, in `nice` units: a tenth of the CPU share.
const LOW_PRIORITY_NICE: i32 = 10;

pub(super) struct Output {
    pub status: ExitStatus,
    /// Limited to [`CHECK_OUTPUT_MAX`].
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

/// The environment is cleared because OPA reads flags from it.
pub(super) async fn run(command: &mut Command, limit: Duration) -> Result<Output, Error> {
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get) as u64;
    command.env_clear().env("GOMEMLIMIT", GO_MEMORY_LIMIT).kill_on_drop(true);
    command.env("GOMAXPROCS", cores.min(THREADS_MAX).to_string());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", path);
    }
    let mut child = command.spawn().map_err(Error::Run)?;
    let pid = child.id().and_then(|id| Pid::from_raw(id.try_into().ok()?));
    // The CPU limit ends runs of a killed hub. Limits are best effort.
    for (resource, max) in
        [(Resource::Data, MEMORY_MAX), (Resource::Cpu, (cores + 1) * (limit.as_secs() + 1))]
    {
        if pid.is_some() {
            _ = prlimit(pid, resource, Rlimit { current: Some(max), maximum: Some(max) });
        }
    }
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let stdout_pipe = child.stdout.take().expect("stdout is piped");
    let stderr_pipe = child.stderr.take().expect("stderr is piped");
    let (mut stdout_pipe, mut stderr_pipe) =
        (stdout_pipe.take(CHECK_OUTPUT_MAX), stderr_pipe.take(CHECK_OUTPUT_MAX));
    let finished = async {
        tokio::try_join!(stdout_pipe.read_to_end(&mut stdout), stderr_pipe.read_to_end(&mut stderr))?;
        // More output must not block the process.
        drop((stdout_pipe, stderr_pipe));
        child.wait().await
    };
    let lower_later = async {
        tokio::time::sleep(LOWER_PRIORITY_AFTER).await;
        if let Some(pid) = pid {
            lower_priority(pid);
        }
        std::future::pending::<Infallible>().await
    };
    let bounded = async {
        tokio::select! {
            status = finished => status,
            never = lower_later => match never {},
        }
    };
    let status =
        tokio::time::timeout(limit, bounded).await.map_err(|_| Error::TooLong(limit))?.map_err(Error::Run)?;
    Ok(Output { status, stdout, stderr })
}

/// Lowers the priority of all threads; new threads inherit it.
fn lower_priority(process: Pid) {
    let threads = std::fs::read_dir(format!("/proc/{}/task", process.as_raw_nonzero()));
    let ids = threads
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|thread| thread.file_name().to_str()?.parse().ok());
    for thread in ids.filter_map(Pid::from_raw) {
        // The thread may have ended.
        _ = setpriority_process(Some(thread), LOW_PRIORITY_NICE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn runs_have_limits_and_low_priority() {
        // Waits for the lower priority, then prints memory and CPU limits.
        let script = "until [ \"$(nice)\" = 10 ]; do sleep 0.05; done; ulimit -d; ulimit -t";
        let output = run(Command::new("sh").args(["-c", script]), Duration::from_secs(30)).await.unwrap();
        let seconds = (std::thread::available_parallelism().unwrap().get() + 1) * 31;
        assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{}\n{seconds}\n", MEMORY_MAX >> 10));
        let found = run(Command::new("sh").args(["-c", "sleep 30"]), Duration::from_millis(10)).await;
        assert!(matches!(found, Err(Error::TooLong(_))));
    }
}

//! One run of OPA, bounded in time, memory and output. A run that takes long gives way to shorter ones and to the hub.

use std::convert::Infallible;
use std::num::NonZero;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, prlimit, setpriority_process};
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;

use super::Error;
use crate::config::CHECK_OUTPUT_MAX;

/// Maximum bytes of memory that a run may allocate. A rule with 30,000 definitions takes 350 MB to plan.
const MEMORY_MAX: u64 = 1 << 30;
/// The size of its heap from which a run collects garbage before it allocates, as Go's runtime reads it: 3/4 of
/// [`MEMORY_MAX`].
const GO_MEMORY_LIMIT: &str = "768MiB";
/// Maximum number of threads that work at a time: the stack of each counts 8 MB of [`MEMORY_MAX`].
const THREADS_MAX: u64 = 8;
/// Time after which a run gives way: a check of a hundred modules takes a tenth of it.
const SHORT: Duration = Duration::from_secs(1);
/// Priority of a run that gives way, as `nice` counts: a tenth of the share of one that does not, which still ends it.
const LONG_NICE: i32 = 10;

/// Result of a run.
pub(super) struct Output {
    /// Exit status.
    pub status: ExitStatus,
    /// Its output, at most [`CHECK_OUTPUT_MAX`] bytes.
    pub stdout: Vec<u8>,
    /// Its errors, at most as many.
    pub stderr: Vec<u8>,
}

/// Runs a command for this time at most, in an environment of its own: OPA takes flags from it.
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
    // A run whose hub was killed ends by the limit of CPU. Without the limits it is as it would be elsewhere.
    for (resource, max) in
        [(Resource::Data, MEMORY_MAX), (Resource::Cpu, (cores + 1) * (limit.as_secs() + 1))]
    {
        if pid.is_some() {
            _ = prlimit(pid, resource, Rlimit { current: Some(max), maximum: Some(max) });
        }
    }
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let out = child.stdout.take().expect("it is piped");
    let err = child.stderr.take().expect("it is piped");
    let (mut out, mut err) = (out.take(CHECK_OUTPUT_MAX), err.take(CHECK_OUTPUT_MAX));
    let all = async {
        tokio::try_join!(out.read_to_end(&mut stdout), err.read_to_end(&mut stderr))?;
        // What is over the bound is not read, and must not hold the process.
        drop((out, err));
        child.wait().await
    };
    let give_way = async {
        tokio::time::sleep(SHORT).await;
        if let Some(pid) = pid {
            give_way(pid);
        }
        std::future::pending::<Infallible>().await
    };
    let bounded = async {
        tokio::select! {
            status = all => status,
            never = give_way => match never {},
        }
    };
    let status =
        tokio::time::timeout(limit, bounded).await.map_err(|_| Error::TooLong(limit))?.map_err(Error::Run)?;
    Ok(Output { status, stdout, stderr })
}

/// Lowers the priority of all threads of the process; those that it starts later inherit it.
fn give_way(process: Pid) {
    let threads = std::fs::read_dir(format!("/proc/{}/task", process.as_raw_nonzero()));
    let ids = threads
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|thread| thread.file_name().to_str()?.parse().ok());
    for thread in ids.filter_map(Pid::from_raw) {
        // It may have ended.
        _ = setpriority_process(Some(thread), LONG_NICE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_run_is_bounded_and_gives_way() {
        // Ends once its priority is lower, and prints the memory and seconds of CPU that it may have.
        let script = "until [ \"$(nice)\" = 10 ]; do sleep 0.05; done; ulimit -d; ulimit -t";
        let output = run(Command::new("sh").args(["-c", script]), Duration::from_secs(30)).await.unwrap();
        let seconds = (std::thread::available_parallelism().unwrap().get() + 1) * 31;
        assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{}\n{seconds}\n", MEMORY_MAX >> 10));
        let found = run(Command::new("sh").args(["-c", "sleep 30"]), Duration::from_millis(10)).await;
        assert!(matches!(found, Err(Error::TooLong(_))));
    }
}

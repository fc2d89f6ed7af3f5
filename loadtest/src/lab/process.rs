//! Child processes with a log, killed on drop.

use std::fmt::Display;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};

use crate::eventually::eventually;

const TAIL_LINES: usize = 12;

/// Page size of x86-64 and most ARM kernels.
const PAGE_BYTES: u64 = 4096;

/// Resource usage of a process.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Resident memory, in bytes.
    pub rss: u64,
    /// Maximum resident memory, in bytes.
    pub peak: u64,
    /// CPU time, in steps of 10 ms (`USER_HZ` is 100 on Linux).
    pub cpu: Duration,
    /// CPU time of children that ended.
    pub children: Duration,
    /// Slabs and socket buffers of the whole machine, in bytes; zero for a remote process. The share of one process is
    /// not available outside a cgroup.
    pub kernel: u64,
}

/// A child process with a log.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command`; its output is appended to `<dir>/<name>.log`.
    pub fn start(name: &str, dir: &Path, command: &mut Command) -> anyhow::Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log)?;
        let command = command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("starting {name} failed"))?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    /// Retries until success; fails at once, with the end of the log, if the process ends.
    pub async fn until<T, E: Display>(
        &mut self,
        what: &str,
        mut attempt: impl AsyncFnMut() -> Result<T, E>,
    ) -> anyhow::Result<T> {
        let ended = std::cell::Cell::new(None);
        let attempt = async || match self.child.try_wait() {
            Ok(None) => attempt().await.map(Some).map_err(|error| error.to_string()),
            // `Ok` ends the retries.
            Ok(Some(status)) => Ok(ended.replace(Some(status)).and(None)),
            Err(error) => Err(error.to_string()),
        };
        let (value, _) = eventually(what, attempt).await?;
        let tail = || format!("{what}: {} ended with {:?}:\n{}", self.name, ended.get(), self.tail());
        value.with_context(tail)
    }

    /// Exit status and last log lines; `None` while running.
    pub fn exit_error(&mut self) -> Option<anyhow::Error> {
        let status = self.child.try_wait().ok()??;
        Some(anyhow::anyhow!("{} ended with {status}:\n{}", self.name, self.tail()))
    }

    /// Sends SIGKILL and waits for the end.
    pub fn kill(&mut self) {
        // Both fail only after the process has ended.
        _ = self.child.kill();
        _ = self.child.wait();
    }

    /// Sends SIGSTOP: connections stay open.
    pub fn suspend(&self) -> anyhow::Result<()> {
        let status = Command::new("kill").args(["-STOP", &self.child.id().to_string()]).status()?;
        anyhow::ensure!(status.success(), "suspending {} failed", self.name);
        Ok(())
    }

    /// Sends SIGTERM, as Kubernetes does.
    pub fn terminate(&self) -> anyhow::Result<()> {
        let status = Command::new("kill").arg(self.child.id().to_string()).status()?;
        anyhow::ensure!(status.success(), "stopping {} failed", self.name);
        Ok(())
    }

    /// Waits until the process has ended.
    pub async fn ended(&mut self) -> anyhow::Result<()> {
        let name = self.name.clone();
        let ended = async || match self.child.try_wait() {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err("still running".to_owned()),
            Err(error) => Err(error.to_string()),
        };
        eventually(format!("{name} ends"), ended).await.map(drop)
    }

    /// Process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Usage so far.
    pub fn usage(&self) -> anyhow::Result<Usage> {
        Usage::read(&self.child.id().to_string()).with_context(|| format!("{}:\n{}", self.name, self.tail()))
    }

    /// The whole log.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn tail(&self) -> String {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
    }
}

impl Usage {
    /// Usage of the process with this id, or of `self`.
    pub fn read(process: &str) -> anyhow::Result<Self> {
        let file = |name: &str| fs::read_to_string(format!("/proc/{process}/{name}"));
        let status = file("status")?;
        let kilobytes = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.trim_end_matches("kB").trim().parse::<u64>().ok())
        };
        let stat = file("stat")?;
        // The program's name may contain spaces. Fields 14 to 17 of proc_pid_stat(5) are utime to cstime.
        let fields: Vec<_> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
        let [cpu, children] = [11..13, 13..15].map(|range| {
            let ticks = fields.get(range)?.iter().flat_map(|field| field.parse::<u64>());
            Some(Duration::from_millis(ticks.sum::<u64>() * 10))
        });
        Ok(Self {
            rss: kilobytes("VmRSS:").context("reading /proc/PID/status failed: no VmRSS")? << 10,
            peak: kilobytes("VmHWM:").context("reading /proc/PID/status failed: no VmHWM")? << 10,
            cpu: cpu.context("reading /proc/PID/stat failed: no CPU times")?,
            children: children.context("reading /proc/PID/stat failed: no CPU times")?,
            kernel: kernel_memory().context(
                "reading kernel memory failed: unknown format of /proc/meminfo or /proc/net/sockstat",
            )?,
        })
    }
}

fn kernel_memory() -> Option<u64> {
    let number = |file: &str, line: &str, field: &str| {
        let text = fs::read_to_string(file).ok()?;
        let line = text.lines().find(|text| text.starts_with(line))?;
        line.split_whitespace().skip_while(|word| *word != field).nth(1)?.parse::<u64>().ok()
    };
    let slabs = number("/proc/meminfo", "Slab:", "Slab:")? << 10;
    Some(slabs + number("/proc/net/sockstat", "TCP:", "mem")? * PAGE_BYTES)
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.log.display(), self.tail());
        }
    }
}

/// A program of this workspace, rebuilt if older than its sources.
pub fn program(name: &str) -> anyhow::Result<PathBuf> {
    let exe = std::env::current_exe()?;
    let mut dir = exe.parent().context("finding the target folder failed: the program has no parent")?;
    if dir.ends_with("deps") {
        dir = dir.parent().context("finding the target folder failed: deps has no parent")?;
    }
    let target = dir.parent().context("finding the target folder failed: the profile has no parent")?;
    let (profile, folder) = match (dir.ends_with("release"), name) {
        (false, _) => ("dev", "debug"),
        (true, "opa-hub-agent") => ("agent", "agent"),
        (true, _) => ("release", "release"),
    };
    let path = target.join(folder).join(name);
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("finding the workspace failed: the crate has no parent")?;
    let built = fs::metadata(&path).and_then(|file| file.modified()).ok();
    let sources = ["Cargo.toml", "Cargo.lock", "proto/src", "hub/src", "agent/src"];
    let newest = sources.map(|part| newest(&workspace.join(part))).into_iter().flatten().max();
    if built.is_none() || newest.is_some_and(|newest| built < Some(newest)) {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.current_dir(workspace).args(["build", "--quiet", "--package", name, "--profile", profile]);
        cargo.arg("--target-dir").arg(target);
        eprintln!("lab: building {name}");
        if !cargo.status().context("starting cargo failed")?.success() {
            bail!("building {name} failed");
        }
        // Cargo does not touch a file that is already up to date.
        fs::File::open(&path)?.set_modified(std::time::SystemTime::now())?;
    }
    Ok(path)
}

fn newest(path: &Path) -> Option<std::time::SystemTime> {
    let modified = fs::metadata(path).ok()?.modified().ok();
    let inner = fs::read_dir(path).into_iter().flatten().flatten().filter_map(|entry| newest(&entry.path()));
    inner.chain(modified).max()
}

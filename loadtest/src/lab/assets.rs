//! Finds the lab's components, or builds them from Go modules into a shared cache.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use sha2::{Digest, Sha256};

use super::apiserver::external;

const GO_MOD: &str = include_str!("../../lab/go.mod");
const GO_SUM: &str = include_str!("../../lab/go.sum");
/// OPA is first: an external cluster needs no other.
const COMPONENTS: [(&str, &str); 4] = [
    ("opa", "github.com/open-policy-agent/opa"),
    ("etcd", "go.etcd.io/etcd/server/v3"),
    ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
    ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
];
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);

/// Folder of the components. Blocks for up to ten minutes of building the first time.
pub fn folder() -> anyhow::Result<PathBuf> {
    let cache = cache()?;
    let installed: Vec<_> = COMPONENTS.iter().map(|(name, _)| find_installed(name)).collect();
    let key = key(&installed);
    let full = cache.join(&key);
    if full.is_dir() {
        return Ok(full);
    }
    let (folder, components) = match external() {
        Some(_) => (cache.join(format!("{key}-opa")), &COMPONENTS[..1]),
        None => (full, &COMPONENTS[..]),
    };
    if folder.is_dir() {
        return Ok(folder);
    }
    fs::create_dir_all(&cache)
        .with_context(|| format!("creating the lab's folder {} failed", cache.display()))?;
    let lock = fs::File::create(cache.join("lock"))?;
    if lock.try_lock().is_err() {
        eprintln!("lab: waiting for another build of the components");
        lock.lock()?;
    }
    if folder.is_dir() {
        return Ok(folder);
    }
    let scratch = folder.with_extension("partial");
    _ = fs::remove_dir_all(&scratch);
    fs::create_dir_all(&scratch)?;
    for ((name, package), path) in components.iter().zip(&installed) {
        match path {
            Some(path) => symlink(path, scratch.join(name))?,
            None => build(&cache, &scratch, name, package)?,
        }
    }
    fs::rename(&scratch, &folder)?;
    Ok(folder)
}

/// Names and versions of the components.
pub fn versions() -> String {
    let name = |(name, package): &(&str, &str)| match find_installed(name) {
        Some(path) => format!("{name} of {}", path.display()),
        None => format!("{name} {}", version(package).unwrap_or("of no version")),
    };
    if let Some(external) = external() {
        return format!("{}, API server {} of a cluster of its own", name(&COMPONENTS[0]), external.version);
    }
    COMPONENTS.iter().filter(|(name, _)| *name != "kubectl").map(name).collect::<Vec<_>>().join(", ")
}

fn find_installed(name: &str) -> Option<PathBuf> {
    let is_file = |path: &PathBuf| path.is_file();
    if name == "opa" {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let bin = std::env::var_os("OPA_BIN").map(PathBuf::from).filter(is_file);
        return bin.or_else(|| std::env::split_paths(&path).map(|dir| dir.join("opa")).find(is_file));
    }
    let assets = std::env::var_os("KUBEBUILDER_ASSETS")?;
    Some(PathBuf::from(assets).join(name)).filter(is_file)
}

fn key(installed: &[Option<PathBuf>]) -> String {
    let mut hasher = Sha256::new();
    hasher.update(GO_MOD);
    hasher.update(GO_SUM);
    hasher.update(format!("{installed:?}"));
    hasher.finalize().iter().take(6).fold(String::new(), |key, byte| format!("{key}{byte:02x}"))
}

fn cache() -> anyhow::Result<PathBuf> {
    let env_path =
        |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let user = || env_path("XDG_CACHE_HOME").or_else(|| Some(env_path("HOME")?.join(".cache")));
    env_path("OPA_HUB_LAB").or_else(|| Some(user()?.join("opa-hub").join("lab"))).context(
        "finding the cache failed: HOME is not set; set OPA_HUB_LAB to a folder for the lab's components",
    )
}

fn build(cache: &Path, out: &Path, name: &str, package: &str) -> anyhow::Result<()> {
    let module = cache.join("module");
    fs::create_dir_all(&module)?;
    fs::write(module.join("go.mod"), GO_MOD)?;
    fs::write(module.join("go.sum"), GO_SUM)?;
    let version = version(package)?;
    // The API server requires a version that parses.
    let flags = format!("-s -w -X k8s.io/component-base/version.gitVersion={version}");
    eprintln!("lab: building {name} {version} from its Go module, once");
    let mut command = Command::new("go");
    command.current_dir(&module).args(["build", "-v", "-trimpath", "-ldflags", &flags, "-o"]);
    command.arg(out.join(name)).arg(package);
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => bail!(
            "building the lab's components failed: go is not installed; install Go {} or newer, or set KUBEBUILDER_ASSETS to a folder with etcd, kube-apiserver and kubectl, and OPA_BIN to opa",
            go_version()
        ),
        Err(error) => return Err(error).context("starting go failed"),
    };
    let started = Instant::now();
    let mut reported = started;
    let mut packages = 0;
    let mut last = Vec::new();
    for line in BufReader::new(child.stderr.take().context("stderr is piped")?).lines() {
        let line = line?;
        packages += 1;
        if reported.elapsed() >= PROGRESS_INTERVAL {
            reported = Instant::now();
            eprintln!("lab:   {name}: {packages} packages, {} s, now {line}", started.elapsed().as_secs());
        }
        last.push(line);
        if last.len() > 20 {
            last.remove(0);
        }
    }
    if !child.wait()?.success() {
        bail!("building {name} {version} failed:\n{}", last.join("\n"));
    }
    eprintln!("lab:   {name}: done in {} s", started.elapsed().as_secs());
    Ok(())
}

fn version(package: &str) -> anyhow::Result<&'static str> {
    let mut requirements = GO_MOD.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        Some((words.next()?, words.next()?))
    });
    let found =
        requirements.find(|(module, version)| package.starts_with(module) && version.starts_with('v'));
    found
        .map(|(_, version)| version)
        .with_context(|| format!("finding a version failed: lab/go.mod does not require {package}"))
}

fn go_version() -> &'static str {
    GO_MOD.lines().find_map(|line| line.strip_prefix("go ")).unwrap_or("1.26")
}

//! Checks modules with OPA, or without one for syntax only.

mod run;
mod syntax;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use opa_hub_proto::manifest::MANIFEST_FILE;
use opa_hub_proto::path::DirPath;
use serde::Deserialize;
use serde_json::json;
use tokio::process::Command;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::model::ObjectKey;
use crate::policy::candidate::{
    CHECK_FAILED, ModuleSet, Selected, Selection, TEST_FAILED, TESTS_NOT_RUN, TESTS_TOO_LONG,
};
use crate::policy::check::run::{Output, run};
use crate::policy::modules::Module;
use crate::policy::plan::Plan;
use crate::policy::verdict::{Diagnostic, Location};

/// Timeout of one OPA run. 10,000 modules take a second.
pub const CHECK_MAX: Duration = Duration::from_secs(10);
/// Timeout of one test run.
pub const TEST_RUN_MAX: Duration = Duration::from_secs(30);
/// Maximum diagnostics of one OPA run.
pub const CHECK_FAULTS_MAX: usize = 100;
/// Timeout of one test in seconds, OPA's default.
pub const TEST_SECONDS: u64 = 5;
/// Time for starting separate test runs after the joint run timed out. A check takes two [`TEST_RUN_MAX`] more.
pub const TESTS_MAX: Duration = Duration::from_secs(30);
/// Pause before unchanged tests that timed out run again.
pub const TESTS_PAUSE: Duration = Duration::from_secs(600);

/// Failure of OPA.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program is not OPA.
    #[error("starting OPA at {program} failed: {reason}; set --opa-bin to an OPA program")]
    NotOpa {
        /// Path of the program.
        program: String,
        /// Cause.
        reason: String,
    },
    /// Modules could not be written.
    #[error("writing modules for OPA failed: {0}")]
    Write(std::io::Error),
    /// The plan could not be read.
    #[error("reading OPA's plan failed: {0}")]
    Read(std::io::Error),
    /// The process could not be started or read.
    #[error("running OPA failed: {0}")]
    Run(std::io::Error),
    /// OPA timed out.
    #[error("OPA timed out after {} s", .0.as_secs())]
    TooLong(Duration),
    /// The plan needs too much memory.
    #[error("analysing OPA's plan failed: {0} bytes exceed the maximum of {PLAN_BYTES_MAX}")]
    PlanTooLarge(u64),
    /// OPA failed without reporting errors.
    #[error("OPA failed with {status}: {output}")]
    Failed {
        /// Exit status.
        status: String,
        /// First bytes of the output.
        output: String,
    },
}

impl Error {
    /// Whether OPA did not start, so that no module is the cause.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::TooLong(_) | Self::Failed { .. } | Self::PlanTooLarge(_) => false,
            // The query names too many packages.
            Self::Run(error) => error.kind() != io::ErrorKind::ArgumentListTooLong,
            _ => true,
        }
    }
}

/// Rego version.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Dialect {
    /// OPA's default.
    #[default]
    Default,
    /// OPA's `--v0-compatible`.
    V0,
    /// OPA's `--v1-compatible`.
    V1,
}

impl Dialect {
    fn flag(self) -> Option<&'static str> {
        match self {
            Self::Default => None,
            Self::V0 => Some("--v0-compatible"),
            Self::V1 => Some("--v1-compatible"),
        }
    }

    /// `None` for the default of OPA.
    pub fn version(self) -> Option<u8> {
        match self {
            Self::Default => None,
            Self::V0 => Some(0),
            Self::V1 => Some(1),
        }
    }
}

/// Policy compiler.
#[derive(Clone, Debug)]
pub enum Compiler {
    /// OPA.
    Opa(Opa),
    /// Another parser, which checks each module alone.
    Syntax(Dialect),
}

/// An OPA program.
#[derive(Clone, Debug)]
pub struct Opa {
    program: PathBuf,
    version: String,
    dialect: Dialect,
    /// Denies the network, which tests and schemas could use.
    capabilities: Arc<tempfile::NamedTempFile>,
    /// Slow tests, with the time of their next run.
    slow_tests: Arc<Mutex<BTreeMap<ObjectKey, (Tests, Instant)>>>,
    /// Permits one plan in memory, for all bundles.
    plans: Arc<Semaphore>,
}

type Tests = BTreeMap<String, Arc<Module>>;

type Suites<'a> = Vec<(&'a ObjectKey, Selected<'a>)>;

impl Compiler {
    /// Finds OPA at `program`, else on the search path, else the parser.
    pub async fn find(program: Option<&Path>, dialect: Dialect) -> Result<Self, Error> {
        match Opa::new(program.unwrap_or(Path::new("opa")), dialect).await {
            Ok(opa) => Ok(Self::Opa(opa)),
            Err(error) if program.is_some() => Err(error),
            Err(_) => Ok(Self::Syntax(dialect)),
        }
    }

    /// Returns this compiler for another bundle.
    #[must_use]
    pub fn with_dialect(&self, dialect: Dialect) -> Self {
        match self {
            Self::Opa(opa) => Self::Opa(Opa { dialect, slow_tests: Arc::default(), ..opa.clone() }),
            Self::Syntax(_) => Self::Syntax(dialect),
        }
    }

    /// Returns a display name.
    pub fn name(&self) -> String {
        match self {
            Self::Opa(opa) => format!("OPA {}", opa.version),
            Self::Syntax(_) => "parser (syntax only)".into(),
        }
    }

    /// Returns all faults. Tests need modules that compile. Failures of OPA are faults ([`CHECK_FAILED`])
    /// unless transient.
    pub async fn check(&self, selection: &Selection<'_>) -> Result<Vec<Diagnostic>, Error> {
        match self {
            Self::Syntax(dialect) => {
                let texts = selection.values().map(|selected| selected.texts);
                let modules = texts.flat_map(|texts| texts.modules.iter().chain(&texts.tests));
                Ok(modules
                    .filter_map(|(id, module)| syntax::first_error(id, &module.text, *dialect))
                    .collect())
            }
            Self::Opa(opa) => opa.check_all(selection).await,
        }
    }

    /// Plans `decisions` and annotated entrypoints, one plan at a time. `None` without a real OPA.
    pub(crate) async fn plan(
        &self,
        modules: &Modules<'_>,
        decisions: &[&DirPath],
    ) -> Result<Option<Planned>, Error> {
        match self {
            Self::Syntax(_) => Ok(None),
            Self::Opa(opa) => opa.plan(modules, decisions).await.map(Some),
        }
    }

    /// Returns why dependencies may be incomplete.
    pub(crate) fn omission(&self) -> Option<String> {
        let Self::Opa(Opa { version, .. }) = self else { return None };
        let mut numbers = version.split('.').map_while(|number| number.parse().ok());
        let is_new = [numbers.next(), numbers.next()].map(Option::unwrap_or_default) >= COMPLETE_DEPS_SINCE;
        let [major, minor] = COMPLETE_DEPS_SINCE;
        (!is_new).then(|| format!("OPA {version} omits data in `opa deps`; use OPA {major}.{minor} or later"))
    }

    /// `None` without a real OPA.
    pub(crate) async fn dependencies(
        &self,
        modules: &Modules<'_>,
        decisions: &[&DirPath],
    ) -> Result<Option<Dependencies>, Error> {
        match self {
            Self::Syntax(_) => Ok(None),
            Self::Opa(opa) => opa.dependencies(modules, decisions).await.map(Some),
        }
    }
}

/// First OPA whose `opa deps` includes `else` bodies and unused variables (OPA CHANGELOG.md, 1.21.0, issue
/// 4814).
const COMPLETE_DEPS_SINCE: [u32; 2] = [1, 21];

/// Generated package. OPA rejects entrypoints without rules.
const ENTRYPOINT_PACKAGE: &str = "opahub_entry";
/// Maximum size of a plan, in bytes of JSON; a hundred policies have 0.5 MB. Parsing needs six times as much.
const PLAN_BYTES_MAX: u64 = 8 << 20;

fn query(decisions: &[&DirPath]) -> String {
    let term = |decision: &&DirPath| format!("data[\"{}\"]", decision.relative().replace('/', "\"][\""));
    match decisions {
        [decision] => term(decision),
        _ => format!("[{}]", decisions.iter().map(term).collect::<Vec<_>>().join(", ")),
    }
}

/// Modules by id.
pub type Modules<'a> = BTreeMap<&'a String, &'a Arc<Module>>;

pub(crate) struct Planned {
    pub plan: Plan,
    /// Whether annotations declare entrypoints.
    pub is_annotated: bool,
    _permit: OwnedSemaphorePermit,
}

/// Paths below `data`, cut at the first dynamic name.
#[derive(Debug)]
pub(crate) struct Dependencies {
    pub data: Vec<Vec<String>>,
    /// Rules, including indirect dependencies.
    pub rules: Vec<Vec<String>>,
}

#[derive(Deserialize)]
struct Errors {
    errors: Vec<OpaError>,
}

#[derive(Deserialize)]
struct OpaError {
    code: String,
    message: String,
    location: Option<OpaLocation>,
}

#[derive(Deserialize)]
struct OpaLocation {
    file: String,
    row: u64,
    col: u64,
}

#[derive(Deserialize)]
struct Test {
    location: OpaLocation,
    package: String,
    name: String,
    #[serde(default)]
    fail: bool,
    error: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Refs {
    #[serde(default)]
    base: Vec<Vec<Term>>,
    #[serde(default)]
    r#virtual: Vec<Vec<Term>>,
}

#[derive(Deserialize)]
struct Term {
    #[serde(rename = "type")]
    kind: String,
    value: serde_json::Value,
}

impl Opa {
    async fn new(program: &Path, dialect: Dialect) -> Result<Self, Error> {
        let not_opa = |reason: String| Error::NotOpa { program: program.display().to_string(), reason };
        let output = run(Command::new(program).arg("version"), CHECK_MAX)
            .await
            .map_err(|error| not_opa(error.to_string()))?;
        let output = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = output.lines().find_map(|line| line.strip_prefix("Version: "));
        let version = version.ok_or_else(|| not_opa("no version in the output".into()))?.trim().to_owned();
        let capabilities = run(Command::new(program).args(["capabilities", "--current"]), CHECK_MAX).await?;
        let mut capabilities: serde_json::Value = serde_json::from_slice(&capabilities.stdout)
            .map_err(|error| not_opa(format!("parsing the capabilities failed: {error}")))?;
        capabilities["allow_net"] = json!([]);
        let file = tempfile::NamedTempFile::new().map_err(Error::Write)?;
        std::fs::write(file.path(), capabilities.to_string()).map_err(Error::Write)?;
        let (program, capabilities) = (program.to_owned(), Arc::new(file));
        let plans = Arc::new(Semaphore::new(1));
        Ok(Self { program, version, dialect, capabilities, slow_tests: Arc::default(), plans })
    }

    async fn check_all(&self, selection: &Selection<'_>) -> Result<Vec<Diagnostic>, Error> {
        let modules: Modules = selection.values().flat_map(|selected| &selected.texts.modules).collect();
        let suites = selection.iter().filter(|(_, selected)| !selected.texts.tests.is_empty());
        let suites: Suites = suites.map(|(key, selected)| (*key, *selected)).collect();
        if modules.is_empty() && suites.is_empty() {
            // If an empty policy fails, no change is the cause.
            let (id, module) = (String::new(), Arc::new(Module::read("package opahub").expect("a module")));
            return match self.check(&Modules::from([(&id, &module)])).await {
                Err(error) if !error.is_transient() => Ok(vec![Diagnostic::new(
                    CHECK_FAILED,
                    format!("checking an empty policy failed: {error}"),
                )]),
                checked => checked,
            };
        }
        match self.check(&modules).await {
            Ok(faults) if faults.is_empty() => self.test_all(&modules, suites).await,
            Err(error) if !error.is_transient() => {
                let message = format!(
                    "check failed: {error}; make the policy cheaper to compile (an edit triggers a retry)"
                );
                Ok(vec![Diagnostic::new(CHECK_FAILED, message)])
            }
            checked => checked,
        }
    }

    /// Runs all tests together, else by ConfigMap. Faults belong to the test's ConfigMap.
    async fn test_all(
        &self,
        modules: &Modules<'_>,
        mut suites: Suites<'_>,
    ) -> Result<Vec<Diagnostic>, Error> {
        let mut faults = self.skip_slow_tests(&mut suites);
        let started = Instant::now();
        while !suites.is_empty() && started.elapsed() < TESTS_MAX {
            let tests = suites.iter().flat_map(|(_, selected)| &selected.texts.tests);
            let all: Modules = modules.iter().map(|(id, module)| (*id, *module)).chain(tests).collect();
            let found = match self.check(&all).await {
                Ok(found) if found.is_empty() => match self.test(&all, None).await {
                    Ok(found) => {
                        faults.extend(found);
                        return Ok(faults);
                    }
                    Err(error) => Err(error),
                },
                checked => checked,
            };
            let found = match found {
                Err(error) if error.is_transient() => return Err(error),
                Err(_) => break,
                Ok(found) => found,
            };
            let is_named = |texts: &ModuleSet, fault: &Diagnostic| {
                fault.location.as_ref().is_some_and(|location| texts.tests.contains_key(&location.file))
            };
            let count = suites.len();
            suites.retain(|(_, selected)| {
                let own_faults = found.iter().filter(|fault| is_named(selected.texts, fault));
                let before = faults.len();
                faults.extend(own_faults.map(|fault| Diagnostic {
                    location: fault.location.clone(),
                    ..test_compile_fault(fault)
                }));
                faults.len() == before
            });
            if suites.len() == count {
                // OPA named only modules.
                break;
            }
        }
        faults.extend(self.test_each(modules, suites).await?);
        Ok(faults)
    }

    /// Runs each ConfigMap's tests alone, changed ones first.
    async fn test_each(
        &self,
        modules: &Modules<'_>,
        mut suites: Suites<'_>,
    ) -> Result<Vec<Diagnostic>, Error> {
        suites.sort_by_key(|(_, selected)| !selected.is_changed);
        let started = Instant::now();
        let mut faults = Vec::new();
        for (key, Selected { texts: ModuleSet { tests, .. }, .. }) in suites {
            if started.elapsed() >= TESTS_MAX {
                let message =
                    "tests skipped: the tests of all ConfigMaps take too long together; make them cheaper";
                faults.push(locate_in_tests(tests, Diagnostic::new(TESTS_NOT_RUN, message)));
                continue;
            }
            let all: Modules = modules.iter().map(|(id, module)| (*id, *module)).chain(tests).collect();
            let packages = test_name_pattern(tests);
            let mut found = self.test(&all, Some(&packages)).await;
            if let Err(Error::Failed { .. }) = found {
                // Tests that do not compile fail alike, and so may a busy OPA.
                found = match self.check(&all).await {
                    Ok(found) if found.is_empty() => self.test(&all, Some(&packages)).await,
                    Ok(found) => Ok(vec![locate_in_tests(tests, test_compile_fault(&found[0]))]),
                    Err(error) => Err(error),
                };
            }
            match found {
                Ok(found) => faults.extend(found),
                Err(error) if error.is_transient() => return Err(error),
                Err(Error::TooLong(_)) => {
                    let retry_at = Instant::now() + TESTS_PAUSE;
                    self.slow_tests().insert(key.clone(), (tests.clone(), retry_at));
                    faults.push(timeout_fault(tests));
                }
                Err(error) => {
                    faults.push(locate_in_tests(tests, Diagnostic::new(TEST_FAILED, error.to_string())));
                }
            }
        }
        Ok(faults)
    }

    /// Removes tests that were slow recently and returns their faults.
    fn skip_slow_tests(&self, suites: &mut Suites<'_>) -> Vec<Diagnostic> {
        let (now, mut slow, mut faults) = (Instant::now(), self.slow_tests(), Vec::new());
        slow.retain(|_, (_, retry_at)| *retry_at > now);
        suites.retain(|(key, selected)| {
            let tests = &selected.texts.tests;
            let is_slow = slow.get(*key).is_some_and(|(slow, _)| slow == tests);
            faults.extend(is_slow.then(|| timeout_fault(tests)));
            !is_slow
        });
        faults
    }

    fn slow_tests(&self) -> MutexGuard<'_, BTreeMap<ObjectKey, (Tests, Instant)>> {
        self.slow_tests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn check(&self, modules: &Modules<'_>) -> Result<Vec<Diagnostic>, Error> {
        let module_dir = ModuleDir::write(modules)?;
        let max = CHECK_FAULTS_MAX.to_string();
        let command =
            ["check", "--format=json", "--max-errors", &max, "--capabilities", &self.capabilities()];
        let output = self.run(&module_dir, &command, &["."]).await?;
        if output.status.success() {
            return Ok(Vec::new());
        }
        let errors =
            serde_json::from_slice(&output.stderr).map(|Errors { errors }| errors).unwrap_or_default();
        if errors.is_empty() {
            return Err(opa_failure(&output));
        }
        let has_location = errors.iter().any(|error| error.location.is_some());
        // OPA's notice of more errors has no location.
        let reported = errors.into_iter().filter(|error| error.location.is_some() || !has_location);
        Ok(reported
            .map(|error| Diagnostic {
                location: error.location.map(|location| module_dir.location(location)),
                ..Diagnostic::new(&error.code, module_dir.rename(&error.message))
            })
            .collect())
    }

    async fn test(&self, modules: &Modules<'_>, names: Option<&str>) -> Result<Vec<Diagnostic>, Error> {
        let module_dir = ModuleDir::write(modules)?;
        let timeout = format!("--timeout={TEST_SECONDS}s");
        let capabilities = self.capabilities();
        let mut command = vec!["test", "--format=json", &timeout, "--capabilities", &capabilities];
        command.extend(names.into_iter().flat_map(|names| ["--run", names]));
        let output = self.run(&module_dir, &command, &["."]).await?;
        let tests: Vec<Test> = serde_json::from_slice(&output.stdout).map_err(|_| opa_failure(&output))?;
        let failed = tests.into_iter().filter(|test| test.fail || test.error.is_some());
        Ok(failed
            .map(|test| {
                let reason = test.error.as_ref().and_then(|error| error["message"].as_str());
                let reason = reason.map(|reason| format!(": {reason}")).unwrap_or_default();
                let message = format!("test {}.{} failed{reason}", test.package, test.name);
                Diagnostic {
                    location: Some(module_dir.location(test.location)),
                    ..Diagnostic::new(TEST_FAILED, message)
                }
            })
            .collect())
    }

    async fn dependencies(
        &self,
        modules: &Modules<'_>,
        decisions: &[&DirPath],
    ) -> Result<Dependencies, Error> {
        let module_dir = ModuleDir::write(modules)?;
        // `opa deps` has no flag for the Rego version.
        let manifest = json!({ "roots": [""], "rego_version": self.dialect.version() });
        std::fs::write(module_dir.dir.path().join(MANIFEST_FILE), manifest.to_string())
            .map_err(Error::Write)?;
        let output =
            self.run(&module_dir, &["deps", "--format=json", "--bundle=."], &[&query(decisions)]).await?;
        let found: Refs = serde_json::from_slice(&output.stdout).map_err(|_| opa_failure(&output))?;
        let names = |terms: Vec<Term>| {
            let mut terms = terms.into_iter();
            terms.next().filter(|term| term.value == "data")?;
            let constant =
                |term: Term| Some(term.value.as_str().filter(|_| term.kind == "string")?.to_owned());
            Some(terms.map_while(constant).collect())
        };
        let paths = |refs: Vec<_>| refs.into_iter().filter_map(names).collect();
        Ok(Dependencies { data: paths(found.base), rules: paths(found.r#virtual) })
    }

    async fn plan(&self, modules: &Modules<'_>, decisions: &[&DirPath]) -> Result<Planned, Error> {
        let module_dir = ModuleDir::write(modules)?;
        let mut package = ENTRYPOINT_PACKAGE.to_owned();
        while modules.values().any(|module| module.root.relative().split('/').next() == Some(&package)) {
            package.push('_');
        }
        let rules = decisions
            .iter()
            .enumerate()
            .map(|(index, decision)| format!("p{index} := {}\n", query(&[decision])));
        // The package needs a rule even without decisions.
        let header = format!("package {package}\n\nnone := true\n");
        let entry: Vec<_> = std::iter::once(header).chain(rules).collect();
        std::fs::write(module_dir.dir.path().join("entry.rego"), entry.join("\n")).map_err(Error::Write)?;
        // OPA adds annotated entrypoints; `--prune-unused` excludes rules that use them.
        let command =
            ["build", "--target=plan", "--prune-unused", "--entrypoint", &package, "--output=.plan.tar.gz"];
        let output = self.run(&module_dir, &command, &["."]).await?;
        if !output.status.success() {
            let message = module_dir.rename(&String::from_utf8_lossy(&output.stderr));
            return Err(opa_failure(&Output { stderr: message.into_bytes(), ..output }));
        }
        let permit = self.plans.clone().acquire_owned().await.expect("the semaphore is never closed");
        let file = std::fs::File::open(module_dir.dir.path().join(".plan.tar.gz")).map_err(Error::Read)?;
        let mut bundle = tar::Archive::new(flate2::read::GzDecoder::new(file));
        for entry in bundle.entries().map_err(Error::Read)? {
            let entry = entry.map_err(Error::Read)?;
            if entry.path().is_ok_and(|path| path.ends_with("plan.json")) {
                if entry.size() > PLAN_BYTES_MAX {
                    return Err(Error::PlanTooLarge(entry.size()));
                }
                let mut plan: Plan =
                    serde_json::from_reader(std::io::BufReader::new(entry)).map_err(|error| {
                        Error::Failed { status: "a malformed plan".into(), output: error.to_string() }
                    })?;
                plan.rename_files(|file| module_dir.id(file).map(str::to_owned));
                let is_annotated = plan.entrypoints().any(|name| name != package);
                return Ok(Planned { plan, is_annotated, _permit: permit });
            }
        }
        Err(Error::Failed { status: output.status.to_string(), output: "no plan".into() })
    }

    fn capabilities(&self) -> String {
        self.capabilities.path().display().to_string()
    }

    async fn run(
        &self,
        module_dir: &ModuleDir,
        command: &[&str],
        arguments: &[&str],
    ) -> Result<Output, Error> {
        let (dialect, is_test) = (self.dialect.flag().filter(|_| command[0] != "deps"), command[0] == "test");
        let command = command.iter().copied().chain(dialect).chain(arguments.iter().copied());
        let limit = if is_test { TEST_RUN_MAX } else { CHECK_MAX };
        run(Command::new(&self.program).args(command).current_dir(module_dir.dir.path()), limit).await
    }
}

fn test_compile_fault(fault: &Diagnostic) -> Diagnostic {
    Diagnostic::new(TEST_FAILED, format!("compiling tests failed: {}: {}", fault.code, fault.message))
}

fn timeout_fault(tests: &Tests) -> Diagnostic {
    let seconds = TEST_RUN_MAX.as_secs();
    let message =
        format!("tests timed out after {seconds} s; make them cheaper or divide them among ConfigMaps");
    locate_in_tests(tests, Diagnostic::new(TESTS_TOO_LONG, message))
}

fn locate_in_tests(tests: &Tests, fault: Diagnostic) -> Diagnostic {
    let location = tests.keys().next().map(|id| Location { file: id.clone(), row: 1, col: 0 });
    Diagnostic { location, ..fault }
}

/// Returns a regular expression for names such as `data.a["b-c"].test_d`.
fn test_name_pattern(tests: &Tests) -> String {
    let is_written = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let package = |module: &Arc<Module>| {
        let words = module.root.relative().split(|c| !is_written(c)).filter(|word| !word.is_empty());
        words.collect::<Vec<_>>().join("\\W+")
    };
    let packages: BTreeSet<_> = tests.values().map(package).collect();
    format!("^data\\W+({})\\b", packages.into_iter().collect::<Vec<_>>().join("|"))
}

fn opa_failure(result: &Output) -> Error {
    let output = if result.stderr.is_empty() { &result.stdout } else { &result.stderr };
    let output = String::from_utf8_lossy(&output[..output.len().min(500)]).trim().to_owned();
    Error::Failed { status: result.status.to_string(), output }
}

/// Modules as numbered files: ids may be too long.
struct ModuleDir {
    dir: tempfile::TempDir,
    ids: Vec<String>,
}

impl ModuleDir {
    fn write(modules: &Modules) -> Result<Self, Error> {
        let dir = tempfile::tempdir().map_err(Error::Write)?;
        for (index, module) in modules.values().enumerate() {
            std::fs::write(dir.path().join(file_name(index)), &module.text).map_err(Error::Write)?;
        }
        Ok(Self { dir, ids: modules.keys().map(|id| (*id).clone()).collect() })
    }

    fn location(&self, location: OpaLocation) -> Location {
        let file = self.id(&location.file).map(str::to_owned).unwrap_or(location.file);
        Location { file, row: location.row, col: location.col }
    }

    fn id(&self, file: &str) -> Option<&str> {
        let file = file.strip_prefix("./").unwrap_or(file);
        let index = file.strip_prefix('m')?.strip_suffix(".rego")?.parse::<usize>().ok()?;
        self.ids.get(index).map(String::as_str)
    }

    /// Replaces file names by module ids.
    fn rename(&self, message: &str) -> String {
        let mut renamed = String::with_capacity(message.len());
        let mut rest = message;
        while let Some(start) = rest.find('m') {
            let (before, from) = rest.split_at(start);
            renamed.push_str(before);
            let digits = from[1..].bytes().take_while(u8::is_ascii_digit).count();
            let is_file = digits == FILE_DIGITS && from[1 + digits..].starts_with(".rego");
            let id = is_file.then(|| self.ids.get(from[1..=digits].parse::<usize>().ok()?)).flatten();
            renamed.push_str(id.map_or("m", String::as_str));
            rest = &from[if id.is_some() { 1 + digits + ".rego".len() } else { 1 }..];
        }
        renamed + rest
    }
}

/// Zero-padded, since OPA sorts files by name.
const FILE_DIGITS: usize = 7;

fn file_name(index: usize) -> String {
    format!("m{index:0FILE_DIGITS$}.rego")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(name: &str, module: &str, test: &str) -> ModuleSet {
        let module_set = |file: &str, text: &str| {
            let module = Arc::new(Module::read(&format!("package {name}\n{text}")).unwrap());
            (!text.is_empty()).then(|| (format!("ns/{name}/{file}"), module))
        };
        let [modules, tests] =
            [module_set("m", module), module_set("t", test)].map(|file| file.into_iter().collect());
        ModuleSet { modules, tests }
    }

    /// A fake OPA that logs its runs.
    async fn fake_opa() -> (tempfile::TempDir, Compiler) {
        let dir = tempfile::tempdir().unwrap();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake-opa.sh");
        std::os::unix::fs::symlink(script, dir.path().join("opa")).unwrap();
        let compiler = Compiler::find(Some(&dir.path().join("opa")), Dialect::Default).await.unwrap();
        (dir, compiler)
    }

    fn runs(dir: &tempfile::TempDir) -> Vec<String> {
        let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
        log.lines().map(str::to_owned).collect()
    }

    /// Checks ConfigMaps `name: module / test`: expects `code file` of faults, and runs.
    async fn check(script: &[&str], faults: &[&str], expected: &[&str]) {
        let (dir, compiler) = fake_opa().await;
        let parse = |line: &&str| {
            let (name, rest) = line.split_once(": ").unwrap();
            let (module, test) = rest.split_once(" / ").unwrap_or((rest, ""));
            (ObjectKey { namespace: "ns".into(), name: name.into() }, texts(name, module, test))
        };
        let all: Vec<_> = script.iter().map(parse).collect();
        let selection: Selection =
            all.iter().map(|(key, texts)| (key, Selected { texts, is_changed: false })).collect();
        let mut found: Vec<_> = compiler.check(&selection).await.unwrap();
        found.sort_by_key(|fault| fault.location.as_ref().map(|location| location.file.clone()));
        let file = |fault: &Diagnostic| {
            fault.location.as_ref().map_or("-".to_owned(), |location| location.file.clone())
        };
        let found: Vec<_> = found.iter().map(|fault| format!("{} {}", fault.code, file(fault))).collect();
        assert_eq!(found, faults, "{script:?}");
        assert_eq!(runs(&dir)[2..], *expected, "{script:?}");
    }

    #[tokio::test]
    async fn test_faults_belong_to_their_configmap() {
        check(&["a: x", "b: x / t"], &[], &["check", "check", "test"]).await;
        check(&["a: BROKEN", "b: x / BROKEN"], &["rego_type_error ns/a/m"], &["check"]).await;
        let faults = ["test_failed ns/b/t", "test_failed ns/c/t"];
        check(&["a: x", "b: x / BROKEN", "c: x / FAIL"], &faults, &["check", "check", "check", "test"]).await;
        check(&["a: x / BROKEN"], &["test_failed ns/a/t"], &["check", "check"]).await;
        let runs = ["check", "check", "test", "check", "test"];
        check(&["a: TARGET", "b: x / BREAKS", "c: x / t"], &["test_failed ns/b/t"], &runs).await;
    }

    #[tokio::test]
    async fn an_opa_that_fails_is_a_fault() {
        check(&[], &[], &["check"]).await;
        check(&["a: x", "b: CRASH"], &["check_failed -"], &["check"]).await;
        let runs = ["check", "check", "test", "test", "check", "test", "test"];
        check(&["a: x / CRASHTEST", "b: x / t"], &["test_failed ns/a/t"], &runs).await;
        let (dir, compiler) = fake_opa().await;
        std::fs::remove_file(dir.path().join("opa")).unwrap();
        let (key, texts) = (ObjectKey { namespace: "ns".into(), name: "a".into() }, texts("a", "x", ""));
        let selection = Selection::from([(&key, Selected { texts: &texts, is_changed: true })]);
        assert!(compiler.check(&selection).await.unwrap_err().is_transient());
    }

    #[tokio::test]
    async fn a_compiler_for_another_bundle_runs_nothing() {
        let (dir, compiler) = fake_opa().await;
        std::fs::remove_file(dir.path().join("opa")).unwrap();
        let other = compiler.with_dialect(Dialect::V1);
        assert_eq!((compiler.name().as_str(), other.name()), ("OPA 1.22.2", compiler.name()));
        assert!(matches!(other, Compiler::Opa(Opa { dialect: Dialect::V1, .. })));
        assert_eq!(runs(&dir), ["version", "capabilities"]);
    }

    #[tokio::test]
    async fn slow_tests_are_not_repeated_at_once() {
        let (dir, compiler) = fake_opa().await;
        let Compiler::Opa(opa) = &compiler else { unreachable!() };
        let key = ObjectKey { namespace: "ns".into(), name: "a".into() };
        let (slow, other) = (texts("a", "x", "t"), texts("a", "x", "u"));
        opa.slow_tests().insert(key.clone(), (slow.tests.clone(), Instant::now() + TESTS_PAUSE));
        for (texts, codes) in [(&slow, &[TESTS_TOO_LONG][..]), (&other, &[])] {
            let selection = Selection::from([(&key, Selected { texts, is_changed: false })]);
            let faults = compiler.check(&selection).await.unwrap();
            assert!(faults.iter().map(|fault| fault.code.as_str()).eq(codes.iter().copied()), "{faults:?}");
        }
        assert_eq!(runs(&dir)[2..], ["check", "check", "check", "test"]);
        opa.slow_tests().insert(key.clone(), (slow.tests.clone(), Instant::now()));
        let selection = Selection::from([(&key, Selected { texts: &slow, is_changed: false })]);
        assert!(compiler.check(&selection).await.unwrap().is_empty());
    }

    #[test]
    fn tests_are_named_by_their_packages() {
        let texts = texts("a[\"b-c\"]", "", "t");
        assert_eq!(test_name_pattern(&texts.tests), "^data\\W+(a\\W+b\\W+c)\\b");
    }

    #[test]
    fn messages_name_modules_by_id() {
        let (a, b) = ("opa/a/x".to_owned(), "opa/b/y.rego".to_owned());
        let module = Arc::new(Module::read("package m").unwrap());
        let module_dir = ModuleDir::write(&Modules::from([(&a, &module), (&b, &module)])).unwrap();
        let message =
            "multiple default rules m0.x found at m0000000.rego:2, m0000001.rego:3, m0000009.rego:1 m";
        let expected = "multiple default rules m0.x found at opa/a/x:2, opa/b/y.rego:3, m0000009.rego:1 m";
        assert_eq!(module_dir.rename(message), expected);
        let location =
            |file: &str| module_dir.location(OpaLocation { file: file.into(), row: 1, col: 2 }).file;
        assert_eq!(location("./m0000001.rego"), b);
        assert_eq!(location("m0000002.rego"), "m0000002.rego");
    }
}

//! Stores the last good policies in a file or a ConfigMap, for the next start: a rejected ConfigMap no longer contains
//! them (I6).
//!
//! A crash can lose the modules of the last 100 ms. A new leader writes them again.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{ObjectMeta, Patch, PatchParams};
use kube::{Api, Client};
use opa_hub_proto::revision::Digest;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};

use crate::backoff::{BACKOFF_MIN, increased};
use crate::health::Health;
use crate::k8s::{FIELD_MANAGER, RequestError, WRITEBACK_TIMEOUT, report, while_leading, within};
use crate::model::ObjectKey;
use crate::pipeline::WriterCommand;
use crate::policy::candidate::ModuleSet;
use crate::policy::modules::Module;
use crate::policy::registry::LastGood;

/// Maximum compressed bytes of last good policies in a ConfigMap of 1 MiB.
pub const LAST_GOOD_OBJECT_MAX: usize = 1_000_000;
/// Maximum bytes of last good policies, JSON escapes included (up to six bytes each).
pub const LAST_GOOD_BYTES_MAX: u64 = 100 << 20;
/// Debounce of writing last good policies.
pub const LAST_GOOD_SETTLE: Duration = Duration::from_millis(100);

const SUBJECT: &str = "last good policies";
const FILE: &str = "last-good.json.gz";
/// Limit of the API server.
const OBJECT_NAME_MAX: usize = 253;
/// Leaves room for prefix and digest within [`OBJECT_NAME_MAX`].
const READABLE_CHARS_MAX: usize = 200;

/// The last good policies could not be accessed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file or its folder is not accessible.
    #[error("accessing {path} failed: {source}; check --state-dir")]
    File {
        /// Path of the file.
        path: String,
        /// Cause of the failure.
        source: std::io::Error,
    },
    /// The content is not valid.
    #[error("decoding the last good policies failed: {0}; the hub starts without them")]
    Damaged(String),
    /// The request to the API server failed.
    #[error("request to the API server failed: {0}; the hub retries")]
    Cluster(RequestError),
    /// RBAC denies the request.
    #[error(
        "accessing the ConfigMap failed: forbidden; \
         grant the hub the verbs get, create, patch on configmaps in namespace {0}, or set --state-dir"
    )]
    Forbidden(String),
    /// A ConfigMap cannot contain them.
    #[error(
        "writing the ConfigMap failed: {0} compressed bytes exceed the limit of {LAST_GOOD_OBJECT_MAX}; \
         set --state-dir"
    )]
    TooLarge(usize),
}

/// Storage of a bundle's last good policies.
pub enum Place {
    /// No storage.
    Nowhere,
    /// A file.
    File(PathBuf),
    /// A ConfigMap.
    Cluster(Box<Object>),
}

/// A ConfigMap that the hub owns.
pub struct Object {
    configmaps: Api<ConfigMap>,
    namespace: String,
    name: String,
}

impl Place {
    /// Stores a bundle in its own file in `dir`.
    pub fn folder(dir: &Path, bundle: &str) -> Self {
        Self::File(dir.join(format!("{bundle}.{FILE}")))
    }

    /// Stores a bundle in its own ConfigMap.
    pub fn cluster(client: Client, namespace: &str, bundle: &str) -> Self {
        let configmaps = Api::namespaced(client, namespace);
        Self::Cluster(Box::new(Object { configmaps, namespace: namespace.into(), name: object_name(bundle) }))
    }

    /// Sends the stored policies to the writer, and returns their encoding.
    pub async fn restore(&self, writer: mpsc::Sender<WriterCommand>, readiness: &Health) -> Option<Vec<u8>> {
        let mut stored = self.load_with_retry(readiness).await;
        let restored =
            stored.as_deref().map_or_else(|| Ok(LastGood::new()), decode).unwrap_or_else(|error| {
                report(readiness, SUBJECT, error.to_string());
                stored = None;
                LastGood::new()
            });
        if !restored.is_empty() {
            tracing::info!(configmaps = restored.len(), "last good policies restored");
        }
        // Fails only if the bundle was stopped.
        _ = writer.send(WriterCommand::RestoreLastGood(restored)).await;
        stored
    }

    /// Stores accepted policies that differ from `stored`. In a cluster only the leader writes.
    pub async fn keep(
        self,
        mut stored: Option<Vec<u8>>,
        mut good: watch::Receiver<Option<LastGood>>,
        mut leads: watch::Receiver<bool>,
        readiness: Health,
    ) {
        let mut retry = BACKOFF_MIN;
        loop {
            let encoded = good.borrow_and_update().as_ref().map(encode);
            if let Some(encoded) = encoded.filter(|encoded| stored.as_ref() != Some(encoded)) {
                match self.save(&encoded, &leads).await {
                    Some(Ok(())) => {
                        readiness.problem(SUBJECT, None);
                        (stored, retry) = (Some(encoded), BACKOFF_MIN);
                    }
                    Some(Err(error)) => {
                        report(&readiness, SUBJECT, error.to_string());
                        tokio::time::sleep(retry).await;
                        retry = increased(retry);
                        continue;
                    }
                    // The leader reports failed writes.
                    None if retry > BACKOFF_MIN => {
                        readiness.problem(SUBJECT, None);
                        retry = BACKOFF_MIN;
                    }
                    None => {}
                }
            }
            tokio::select! {
                changed = good.changed() => if changed.is_err() { return },
                // The ConfigMap may have changed.
                Ok(()) = leads.changed() => stored = None,
            }
            tokio::time::sleep(LAST_GOOD_SETTLE).await;
        }
    }

    /// Retries API server failures.
    async fn load_with_retry(&self, readiness: &Health) -> Option<Vec<u8>> {
        let mut retry = BACKOFF_MIN;
        loop {
            match self.load().await {
                Ok(stored) => {
                    readiness.problem(SUBJECT, None);
                    return stored;
                }
                Err(error) => {
                    report(readiness, SUBJECT, error.to_string());
                    if !matches!(error, Error::Cluster(_)) {
                        return None;
                    }
                }
            }
            tokio::time::sleep(retry).await;
            retry = increased(retry);
        }
    }

    async fn load(&self) -> Result<Option<Vec<u8>>, Error> {
        match self {
            Self::Nowhere => Ok(None),
            Self::File(path) => match std::fs::read(path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                other => other.map(Some).map_err(|source| file_error(path, source)),
            },
            Self::Cluster(object) => object.load().await,
        }
    }

    /// `None` unless this replica leads until the write completes.
    async fn save(&self, bytes: &[u8], leads: &watch::Receiver<bool>) -> Option<Result<(), Error>> {
        match self {
            Self::Nowhere => Some(Ok(())),
            Self::File(path) => Some(replace_file(path, bytes).map_err(|source| file_error(path, source))),
            Self::Cluster(object) => while_leading(leads, object.save(bytes)).await,
        }
    }
}

impl Object {
    async fn load(&self) -> Result<Option<Vec<u8>>, Error> {
        let found = within(WRITEBACK_TIMEOUT, self.configmaps.get_opt(&self.name)).await;
        let found = found.map_err(|error| self.error(error))?;
        let file = found.and_then(|found| found.binary_data?.remove(FILE));
        Ok(file.map(|ByteString(bytes)| bytes))
    }

    async fn save(&self, bytes: &[u8]) -> Result<(), Error> {
        if bytes.len() > LAST_GOOD_OBJECT_MAX {
            return Err(Error::TooLarge(bytes.len()));
        }
        let labels = BTreeMap::from([("app.kubernetes.io/managed-by".to_owned(), FIELD_MANAGER.to_owned())]);
        let metadata =
            ObjectMeta { name: Some(self.name.clone()), labels: Some(labels), ..ObjectMeta::default() };
        let content = BTreeMap::from([(FILE.to_owned(), ByteString(bytes.to_owned()))]);
        let object = ConfigMap { metadata, binary_data: Some(content), ..ConfigMap::default() };
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let patch = Patch::Apply(&object);
        let patched = within(WRITEBACK_TIMEOUT, self.configmaps.patch(&self.name, &params, &patch)).await;
        patched.map(drop).map_err(|error| self.error(error))
    }

    fn error(&self, error: RequestError) -> Error {
        if error.is_forbidden() { Error::Forbidden(self.namespace.clone()) } else { Error::Cluster(error) }
    }
}

/// Returns `opa-hub-<bundle>` if valid, else `opa-hub-<readable>-<digest>`.
///
/// Names are valid DNS subdomains and unique: the first form never ends in `-<digest>`, and digests of different bundle
/// names differ.
pub fn object_name(bundle: &str) -> String {
    let plain = format!("opa-hub-{bundle}");
    let ends_in_digest = plain.rsplit_once('-').is_some_and(|(_, end)| end.parse::<Digest>().is_ok());
    if is_object_name(&plain) && !ends_in_digest {
        return plain;
    }
    let readable = bundle.to_ascii_lowercase().replace(|c: char| !is_alphanumeric(c), "-");
    let readable: String = readable.chars().take(READABLE_CHARS_MAX).collect();
    format!("opa-hub-{readable}-{}", Digest::of(bundle.as_bytes()))
}

/// `IsDNS1123Subdomain` (apimachinery pkg/util/validation).
fn is_object_name(name: &str) -> bool {
    let is_label = |label: &str| {
        label.starts_with(is_alphanumeric)
            && label.ends_with(is_alphanumeric)
            && label.chars().all(|c| c == '-' || is_alphanumeric(c))
    };
    name.len() <= OBJECT_NAME_MAX && name.split('.').all(is_label)
}

fn is_alphanumeric(c: char) -> bool {
    matches!(c, 'a'..='z' | '0'..='9')
}

/// A crash leaves the old or the new content.
fn replace_file(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(dir)?;
    let mut draft = tempfile::NamedTempFile::new_in(dir)?;
    draft.write_all(bytes)?;
    draft.as_file().sync_all()?;
    draft.persist(path)?;
    Ok(())
}

fn file_error(path: &Path, source: std::io::Error) -> Error {
    Error::File { path: path.display().to_string(), source }
}

#[derive(Serialize, Deserialize, Default)]
struct Saved {
    /// By `namespace/name`.
    configmaps: BTreeMap<String, SavedModules>,
}

#[derive(Serialize, Deserialize, Default)]
struct SavedModules {
    modules: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    tests: BTreeMap<String, String>,
}

fn encode(good: &LastGood) -> Vec<u8> {
    let texts = |modules: &BTreeMap<String, Arc<Module>>| {
        modules.iter().map(|(id, module)| (id.clone(), module.text.clone())).collect()
    };
    let save = |set: &ModuleSet| SavedModules { modules: texts(&set.modules), tests: texts(&set.tests) };
    let saved = Saved { configmaps: good.iter().map(|(key, set)| (key.to_string(), save(set))).collect() };
    let json = serde_json::to_vec(&saved).expect("all keys are strings");
    let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
    gzip.write_all(&json).and_then(|()| gzip.finish()).expect("memory is writable")
}

fn decode(bytes: &[u8]) -> Result<LastGood, Error> {
    let mut json = Vec::new();
    let mut gzip = GzDecoder::new(bytes).take(LAST_GOOD_BYTES_MAX);
    gzip.read_to_end(&mut json).map_err(|error| Error::Damaged(error.to_string()))?;
    let saved: Saved = serde_json::from_slice(&json).map_err(|error| Error::Damaged(error.to_string()))?;
    let module = |(id, text): (String, String)| {
        let module = Module::read(&text).map_err(|error| Error::Damaged(format!("{id}: {error}")))?;
        Ok((id, Arc::new(module)))
    };
    let modules_of = |(key, saved): (String, SavedModules)| {
        let (namespace, name) =
            key.split_once('/').ok_or_else(|| Error::Damaged(format!("{key:?} is not namespace/name")))?;
        let key = ObjectKey { namespace: namespace.into(), name: name.into() };
        let modules = saved.modules.into_iter().map(module).collect::<Result<_, _>>()?;
        let tests = saved.tests.into_iter().map(module).collect::<Result<_, _>>()?;
        Ok((key, Arc::new(ModuleSet { modules, tests })))
    };
    saved.configmaps.into_iter().map(modules_of).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::status::fake_api::{
        Cluster, Link, NAMESPACE, check_ends_with_leadership, check_reports_and_retries, eventually,
    };

    fn good() -> LastGood {
        let module = |text: &str| Arc::new(Module::read(text).unwrap());
        let texts = ModuleSet {
            modules: BTreeMap::from([("opa/a/x".to_owned(), module("package x"))]),
            tests: BTreeMap::from([("opa/a/x_test.rego".to_owned(), module("package x_test"))]),
        };
        BTreeMap::from([(ObjectKey { namespace: "opa".into(), name: "a".into() }, Arc::new(texts))])
    }

    #[test]
    fn stored_policies_are_restored() {
        assert_eq!(decode(&encode(&good())).unwrap(), good());
        assert_eq!(encode(&good()), encode(&good()), "equal content is not written again");
    }

    #[test]
    fn i9_damaged_content_is_reported() {
        let bytes = encode(&good());
        for damaged in [&b""[..], b"{}", &bytes[..bytes.len() / 2]] {
            assert!(matches!(decode(damaged), Err(Error::Damaged(_))));
        }
    }

    #[tokio::test]
    async fn file_is_replaced_and_read() {
        let dir = tempfile::tempdir().unwrap();
        let place = || Place::folder(&dir.path().join("new"), "main");
        let (_, follower) = watch::channel(false);
        assert_eq!(place().load().await.unwrap(), None);
        place().save(b"one", &follower).await.unwrap().unwrap();
        place().save(b"two", &follower).await.unwrap().unwrap();
        assert_eq!(place().load().await.unwrap().as_deref(), Some(&b"two"[..]));
        assert_eq!(std::fs::read_dir(dir.path().join("new")).unwrap().count(), 1);
    }

    #[test]
    fn object_names_are_valid_and_unique() {
        let long = "x".repeat(OBJECT_NAME_MAX - "opa-hub-".len());
        let too_long = format!("{long}x");
        let like_another = object_name("team_a").replacen("opa-hub-", "", 1);
        let digest = Digest::of(b"team_a").to_string();
        let plain = ["main", "team-a", "a.b", "a--b", "-a", "0", &long];
        let odd = [
            "team_a",
            "Team-A",
            "a..b",
            "a.-b",
            "a.",
            "a-",
            "...",
            "_",
            "A",
            &too_long,
            &like_another,
            &digest,
        ];
        for bundle in plain {
            assert_eq!(object_name(bundle), format!("opa-hub-{bundle}"));
        }
        let names: BTreeSet<_> = plain.into_iter().chain(odd).map(object_name).collect();
        assert_eq!(names.len(), plain.len() + odd.len(), "{names:#?}");
        for name in &names {
            let is_valid = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
            assert!(name.len() <= 253 && name.chars().all(is_valid) && !name.contains(".."), "{name}");
            assert!(!name.contains(".-") && !name.contains("-.") && !name.ends_with(['-', '.']), "{name}");
        }
        assert!(object_name("My_bundle").starts_with("opa-hub-my-bundle-"));
    }

    fn write(client: Client, leads: watch::Receiver<bool>, readiness: Health) {
        let (publish, good) = watch::channel(Some(good()));
        tokio::spawn(async move { publish.closed().await });
        tokio::spawn(Place::cluster(client, NAMESPACE, "main").keep(None, good, leads, readiness));
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_written_after_the_lease_expired() {
        check_ends_with_leadership("/configmaps", write).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_write_is_reported_and_retried() {
        check_reports_and_retries("/configmaps", write).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_read_at_the_start_is_reported_and_retried() {
        let read = |client: Client, _: watch::Receiver<bool>, readiness: Health| {
            let (writer, _) = mpsc::channel(1);
            let place = Place::cluster(client, NAMESPACE, "main");
            tokio::spawn(async move { place.restore(writer, &readiness).await });
        };
        check_reports_and_retries("/configmaps", read).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_leader_writes_again_what_another_one_may_have_replaced() {
        let cluster = Cluster::default();
        let link = Link::to(&cluster);
        let (_good, accepted) = watch::channel(Some(good()));
        let (leads, leading) = watch::channel(false);
        let place = Place::cluster(link.client(), NAMESPACE, "main");
        tokio::spawn(place.keep(Some(encode(&good())), accepted, leading, Health::default()));
        for term in 1..=3 {
            cluster.delete("/configmaps");
            leads.send_replace(true);
            let writes = || link.calls().iter().filter(|call| call.is_write()).count();
            eventually("the policies are written", || writes() == term).await;
            leads.send_replace(false);
        }
        let stored = Place::cluster(link.client(), NAMESPACE, "main").load().await.unwrap();
        assert_eq!(stored, Some(encode(&good())));
    }
}

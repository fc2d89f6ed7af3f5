//! Watched folder of manifests. Invalid files retain their last good content.

mod manifest;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::time::SystemTime;

use bytes::Bytes;
use notify::{RecursiveMode, Watcher};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::health::Health;
use crate::model::{Event, InputId, NamespaceSelector, Object, ObjectKey, WatchId, WatchSet, WatchSpec};
use crate::source::Sender;
use crate::source::folder::manifest::{KindRegistry, Manifest};
use crate::spec;

/// Maximum bytes of a manifest file.
pub const MANIFEST_BYTES_MAX: u64 = 512 << 20;
/// Maximum manifest files, so that `/` fails early.
pub const MANIFEST_FILES_MAX: usize = 20_000;
/// Debounce of folder changes. Editors write in several steps.
pub const FOLDER_SETTLE: Duration = Duration::from_millis(20);
/// Maximum debounce of folder changes.
pub const FOLDER_SETTLE_MAX: Duration = Duration::from_millis(500);
/// Interval of full scans. Replaced folders and network file systems report no changes.
pub const FOLDER_RESCAN: Duration = Duration::from_secs(5);

/// Namespace for objects without one, as in `kubectl apply`.
const DEFAULT_NAMESPACE: &str = "default";

/// Failure of the folder as a source.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Missing or unreadable folder.
    #[error("reading manifests folder {path} failed: {source}")]
    Read {
        /// The folder or a subfolder.
        path: PathBuf,
        /// System error.
        source: std::io::Error,
    },
    /// Too many files.
    #[error(
        "reading manifests folder {path} failed: more than {MANIFEST_FILES_MAX} files; choose a smaller folder"
    )]
    TooMany {
        /// The folder.
        path: PathBuf,
    },
    /// Failure to subscribe to changes.
    #[error("watching manifests folder failed: {0}")]
    Watch(#[from] notify::Error),
}

/// Contents of a folder.
pub struct Contents {
    /// Selected objects.
    pub objects: Vec<(InputId, Object)>,
    /// Read failures.
    pub problems: Vec<String>,
}

/// Reads the folder once.
pub fn read_once(dir: &Path, feeds: &[WatchSpec]) -> Result<Contents, Error> {
    let mut folder = Folder::new(dir.to_owned());
    folder.specs = (0..).map(WatchId).zip(feeds.iter().cloned()).collect();
    let events = folder.scan()?.into_iter();
    let objects = events.filter_map(|(id, event)| match event {
        Event::Apply(object) => Some((InputId(id.0), object)),
        _ => None,
    });
    let problems = folder.files.iter().filter_map(|(path, file)| {
        file.problem.as_ref().map(|problem| format!("{}: {problem}", path.display()))
    });
    Ok(Contents { objects: objects.collect(), problems: problems.collect() })
}

/// Runs the `wanted` watches until the store closes.
pub async fn run(dir: PathBuf, mut wanted: WatchSet, out: Sender, readiness: Health) -> Result<(), Error> {
    let (changed, mut changes) = mpsc::channel(1);
    // One pending wake-up is enough: scans are complete.
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        if !event.is_ok_and(|event| event.kind.is_access()) {
            _ = changed.try_send(());
        }
    })?;
    let read_error = |source| Error::Read { path: dir.clone(), source };
    fs::metadata(&dir).map_err(read_error)?;
    watcher.watch(&dir, RecursiveMode::Recursive)?;

    let mut folder = Folder::new(dir);
    let mut is_first = true;
    let mut unlisted = BTreeSet::new();
    let mut watched = inode(&folder.dir);
    loop {
        folder.set_watches(wanted.borrow_and_update().clone(), &mut unlisted);
        let scanned = tokio::task::spawn_blocking(move || {
            let events = folder.scan();
            (folder, events)
        });
        let Ok((returned, events)) = scanned.await else { return Ok(()) };
        folder = returned;
        let (events, problem) = match events {
            Ok(events) => (events, None),
            Err(error) if is_first => return Err(error),
            Err(error) => (Vec::new(), Some(error.to_string())),
        };
        is_first = false;
        let was_read = problem.is_none();
        let listed = if was_read { std::mem::take(&mut unlisted) } else { BTreeSet::new() };
        readiness.problem(&folder.dir.display().to_string(), problem);
        folder.report(&readiness);
        let init = listed.iter().map(|id| (*id, Event::Init));
        let done = listed.iter().map(|id| (*id, Event::InitDone));
        let all: Vec<_> = if was_read { folder.specs.keys().copied().collect() } else { Vec::new() };
        let quiet = all.into_iter().map(|id| (id, Event::Bookmark));
        for (id, event) in init.chain(events).chain(done).chain(quiet) {
            if out.send((id, event, None)).await.is_err() {
                return Ok(());
            }
        }
        tokio::select! {
            () = out.closed() => return Ok(()),
            change = changes.recv() => if change.is_none() { return Ok(()) },
            Ok(()) = wanted.changed() => continue,
            () = tokio::time::sleep(FOLDER_RESCAN) => {}
        }
        let deadline = Instant::now() + FOLDER_SETTLE_MAX;
        while Instant::now() < deadline && tokio::time::timeout(FOLDER_SETTLE, changes.recv()).await.is_ok() {
        }
        let current = inode(&folder.dir);
        if current != watched && current.is_some() {
            // The system still watches the replaced folder.
            _ = watcher.unwatch(&folder.dir);
            watcher.watch(&folder.dir, RecursiveMode::Recursive)?;
            watched = current;
        }
    }
}

/// Unchanged files share their bytes.
fn is_equal(one: &Bytes, other: &Bytes) -> bool {
    (one.as_ptr(), one.len()) == (other.as_ptr(), other.len()) || one == other
}

fn inode(dir: &Path) -> Option<(u64, u64)> {
    fs::metadata(dir).ok().map(|folder| (folder.dev(), folder.ino()))
}

struct Folder {
    dir: PathBuf,
    specs: BTreeMap<WatchId, WatchSpec>,
    files: BTreeMap<PathBuf, File>,
    /// Objects after the last scan.
    objects: BTreeMap<WatchId, HashMap<ObjectKey, Object>>,
    /// Subfolders with read errors.
    unreadable: BTreeMap<PathBuf, String>,
    reported: BTreeSet<String>,
}

struct File {
    stamp: FileStamp,
    /// Last good content.
    manifests: Vec<Manifest>,
    problem: Option<String>,
    /// Duplicate objects and unknown bundle versions.
    rejections: Vec<String>,
}

/// Modification time, length and inode.
type FileStamp = (Option<SystemTime>, u64, u64);

const NEVER_READ: FileStamp = (None, 0, 0);

impl Folder {
    fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            objects: BTreeMap::new(),
            specs: BTreeMap::new(),
            files: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            reported: BTreeSet::new(),
        }
    }

    fn set_watches(&mut self, wanted: BTreeMap<WatchId, WatchSpec>, unlisted: &mut BTreeSet<WatchId>) {
        unlisted.extend(wanted.keys().filter(|id| !self.specs.contains_key(id)));
        unlisted.retain(|id| wanted.contains_key(id));
        self.objects.retain(|id, _| wanted.contains_key(id));
        self.specs = wanted;
    }

    fn scan(&mut self) -> Result<Vec<(WatchId, Event)>, Error> {
        let mut found = BTreeMap::new();
        let mut unreadable = BTreeMap::new();
        find_files(&self.dir, &mut found, &mut unreadable)?;
        // Files in unreadable folders retain their content.
        self.files
            .retain(|path, _| found.contains_key(path) || unreadable.keys().any(|dir| path.starts_with(dir)));
        self.unreadable = unreadable;
        for (path, stamp) in found {
            let file = self.files.entry(path.clone()).or_insert(File {
                stamp: NEVER_READ,
                manifests: Vec::new(),
                problem: None,
                rejections: Vec::new(),
            });
            if file.stamp != stamp || stamp.0.is_none() {
                file.stamp = stamp;
                match read_manifests(&path) {
                    Ok(manifests) => (file.manifests, file.problem) = (manifests, None),
                    Err(problem) => {
                        file.problem = Some(problem);
                        // Permissions and file descriptors change without the stamp.
                        if std::fs::File::open(&path).is_err() {
                            file.stamp = NEVER_READ;
                        }
                    }
                }
            }
        }
        Ok(self.events())
    }

    fn events(&mut self) -> Vec<(WatchId, Event)> {
        let kinds = KindRegistry::from_manifests(self.files.values().flat_map(|file| &file.manifests));
        let mut events = Vec::new();
        for file in self.files.values_mut() {
            // No watch selects these.
            let unknown = file.manifests.iter().filter(|manifest| manifest.is_unknown_bundle());
            file.rejections = unknown
                .map(|manifest| {
                    format!("document {}: {}", manifest.document, spec::Error::Kind(manifest.to_string()))
                })
                .collect();
        }
        for (id, spec) in &self.specs {
            let mut definitions: HashMap<ObjectKey, (&Path, usize)> = HashMap::new();
            let mut current: HashMap<ObjectKey, Object> = HashMap::new();
            let mut selects = kinds.selection(spec);
            for (path, file) in &mut self.files {
                for manifest in file.manifests.iter().filter(|manifest| selects(manifest)) {
                    let mut object = manifest.object.clone();
                    if spec.scope == NamespaceSelector::ClusterScoped
                        || spec.resource.is_named_only() && kinds.is_cluster_scoped(manifest)
                    {
                        object.key.namespace = "".into();
                    } else if object.key.namespace.is_empty() {
                        object.key.namespace = DEFAULT_NAMESPACE.into();
                    }
                    if let Some((other, document)) = definitions.get(&object.key) {
                        file.rejections.push(format!(
                            "document {}: {} {} is already defined in {} document {document}; remove one",
                            manifest.document,
                            manifest.kind,
                            object.key,
                            other.display()
                        ));
                        continue;
                    }
                    definitions.insert(object.key.clone(), (path, manifest.document));
                    current.insert(object.key.clone(), object);
                }
            }
            let previous = self.objects.entry(*id).or_default();
            let removed = previous.keys().filter(|key| !current.contains_key(*key));
            events.extend(removed.map(|key| (*id, Event::Delete(key.clone()))));
            let changed = current.values().filter(|object| {
                previous.get(&object.key).is_none_or(|other| !is_equal(&other.json, &object.json))
            });
            events.extend(changed.map(|object| (*id, Event::Apply(object.clone()))));
            *previous = current;
        }
        events
    }

    fn report(&mut self, readiness: &Health) {
        let mut reported = BTreeSet::new();
        let files = self
            .files
            .iter()
            .map(|(path, file)| (path, file.problem.iter().chain(&file.rejections).cloned().collect()));
        let folders = self.unreadable.iter().map(|(path, problem)| (path, vec![problem.clone()]));
        for (path, messages) in files.chain(folders) {
            let messages: Vec<String> = messages;
            if messages.is_empty() {
                continue;
            }
            let subject = path.display().to_string();
            let message = messages.join("; ");
            if readiness.is_news(&subject, &message) {
                tracing::warn!(file = subject, error = message, "manifest rejected");
            }
            readiness.problem(&subject, Some(message));
            reported.insert(subject);
        }
        for subject in self.reported.difference(&reported) {
            readiness.problem(subject, None);
        }
        self.reported = reported;
    }
}

/// Skips hidden entries, such as `..data` in a mounted ConfigMap.
fn find_files(
    dir: &Path,
    found: &mut BTreeMap<PathBuf, FileStamp>,
    unreadable: &mut BTreeMap<PathBuf, String>,
) -> Result<(), Error> {
    let wrap = |source| Error::Read { path: dir.to_owned(), source };
    for entry in fs::read_dir(dir).map_err(wrap)? {
        let entry = entry.map_err(wrap)?;
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        // Removed after the listing.
        let Ok(metadata) = fs::metadata(&path) else { continue };
        if metadata.is_dir() {
            // Links to folders may be cyclic.
            if path.is_symlink() {
                continue;
            }
            match find_files(&path, found, unreadable) {
                Err(Error::Read { source, .. }) => _ = unreadable.insert(path, source.to_string()),
                other => other?,
            }
        } else if metadata.is_file()
            && path.extension().is_some_and(|ext| ext == "yaml" || ext == "yml" || ext == "json")
        {
            found.insert(path, (metadata.modified().ok(), metadata.len(), metadata.ino()));
            if found.len() > MANIFEST_FILES_MAX {
                return Err(Error::TooMany { path: dir.to_owned() });
            }
        }
    }
    Ok(())
}

/// Reads the objects of one file.
pub fn read_file(path: &Path) -> Result<Vec<Object>, String> {
    Ok(read_manifests(path)?.into_iter().map(|manifest| manifest.object).collect())
}

fn read_manifests(path: &Path) -> Result<Vec<Manifest>, String> {
    let length = fs::metadata(path).map_err(|error| error.to_string())?.len();
    if length > MANIFEST_BYTES_MAX {
        return Err(format!("file has {length} bytes, more than {MANIFEST_BYTES_MAX}; split it"));
    }
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    let is_json = path.extension().is_some_and(|ext| ext == "json");
    if is_json { manifest::parse_json(&text) } else { manifest::parse_yaml(&text) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::{Content, Resource};

    fn folder(dir: &Path) -> Folder {
        let spec = WatchSpec {
            resource: Resource::configmaps(),
            scope: NamespaceSelector::AllExcept { ignored: vec!["left-out".into()] },
            labels: Vec::new(),
            content: Content::Data,
        };
        let mut folder = Folder::new(dir.to_owned());
        folder.specs.insert(WatchId(0), spec);
        folder
    }

    fn configmap(namespace: &str, name: &str, value: &str) -> String {
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: \"{name}\", namespace: {namespace}}}\ndata: {{k: {value}}}\n"
        )
    }

    fn check(folder: &mut Folder, writes: &[(&str, Option<&str>)], expected: &[&str], problems: &[&str]) {
        for (name, text) in writes {
            let path = folder.dir.join(name);
            match text {
                None => fs::remove_file(path).unwrap(),
                Some(text) => fs::write(path, text).unwrap(),
            }
        }
        let mut events: Vec<_> = folder
            .scan()
            .unwrap()
            .into_iter()
            .map(|(_, event)| match event {
                Event::Apply(object) => format!("+{}", object.key),
                Event::Delete(key) => format!("-{key}"),
                _ => unreachable!(),
            })
            .collect();
        events.sort_unstable();
        assert_eq!(events, expected);
        let reported: Vec<_> =
            folder.files.values().flat_map(|file| file.problem.iter().chain(&file.rejections)).collect();
        assert_eq!(reported.len(), problems.len(), "{reported:?}");
        for (problem, part) in reported.iter().zip(problems) {
            assert!(problem.contains(part), "{problem}");
        }
    }

    #[test]
    fn folder_follows_files_and_retains_last_good() {
        let dir = tempfile::tempdir().unwrap();
        let mut folder = folder(dir.path());
        let two = [configmap("a", "x", "1"), configmap("left-out", "x", "1"), configmap("a", "y", "1")]
            .join("---\n");
        check(&mut folder, &[("a.yaml", Some(&two)), ("readme.md", Some("x"))], &["+a/x", "+a/y"], &[]);
        check(&mut folder, &[], &[], &[]);
        let broken = format!("{}---\nkind: [", configmap("a", "x", "22"));
        check(&mut folder, &[("a.yaml", Some(&broken))], &[], &["document 2"]);
        check(
            &mut folder,
            &[("b.yaml", Some(&configmap("a", "x", "3")))],
            &[],
            &["document 2", "already defined"],
        );
        check(&mut folder, &[("a.yaml", None)], &["+a/x", "-a/y"], &[]);
        let later = r#"{"apiVersion":"opahub.dev/v2","kind":"Bundle","metadata":{"name":"b"}}"#;
        check(&mut folder, &[("later.json", Some(later))], &[], &["opahub.dev/v2 Bundle is not supported"]);
        check(&mut folder, &[("later.json", None)], &[], &[]);
        let list = r#"{"apiVersion":"v1","kind":"ConfigMapList","items":[{"metadata":{"name":"z"}}]}"#;
        check(&mut folder, &[("b.yaml", None), ("c.json", Some(list))], &["+default/z", "-a/x"], &[]);
    }

    proptest! {
        /// I9: any file is read or rejected.
        #[test]
        fn i9_random_files_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..256), text in "[-{}\\[\\]:, \n\"'&*!a-c]{0,64}") {
            for text in [String::from_utf8_lossy(&bytes).into_owned(), text] {
                let _ = manifest::parse_yaml(&text);
                let _ = manifest::parse_json(&text);
            }
        }
    }
}

//! A folder of manifests as a source: what `kubectl apply -f` takes and what `kubectl get -o json` prints. The
//! folder is watched; a file that does not parse keeps its last good content.

mod manifest;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bytes::Bytes;
use notify::{RecursiveMode, Watcher};
use tokio::sync::mpsc;
use tokio::time::Instant;

use self::manifest::{Kinds, Manifest};
use super::Sender;
use crate::bundle::spec;
use crate::config::{
    FOLDER_RESCAN, FOLDER_SETTLE, FOLDER_SETTLE_MAX, MANIFEST_BYTES_MAX, MANIFEST_FILES_MAX,
};
use crate::model::{Event, Feed, FeedId, Object, ObjectKey, Scope, WatchId};
use crate::readiness::Readiness;
use crate::store::Wanted;

/// The namespace that `kubectl apply` gives an object that names none.
const DEFAULT_NAMESPACE: &str = "default";

/// Why the folder cannot be a source.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It does not exist or cannot be read.
    #[error("cannot read the manifests folder {path}: {source}")]
    Read {
        /// The folder or a folder in it.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// More files than a manifests folder has.
    #[error("{path} holds more than {MANIFEST_FILES_MAX} manifest files: name a smaller folder")]
    TooMany {
        /// The folder.
        path: PathBuf,
    },
    /// The system cannot report changes.
    #[error("cannot watch the manifests folder: {0}")]
    Watch(#[from] notify::Error),
}

/// A folder at one moment.
pub struct Contents {
    /// What the feeds select.
    pub objects: Vec<(FeedId, Object)>,
    /// What cannot be read.
    pub problems: Vec<String>,
}

/// Reads the folder once.
pub fn read_once(dir: &Path, feeds: &[Feed]) -> Result<Contents, Error> {
    let mut folder = Folder::new(dir.to_owned());
    folder.feeds = (0..).map(WatchId).zip(feeds.iter().cloned()).collect();
    let events = folder.scan()?.into_iter();
    let objects = events.filter_map(|(id, event)| match event {
        Event::Apply(object) => Some((FeedId(id.0), object)),
        _ => None,
    });
    let objects = objects.collect();
    let problems = folder.files.iter().filter_map(|(path, file)| {
        file.problem.as_ref().map(|problem| format!("{}: {problem}", path.display()))
    });
    let problems = problems.collect();
    Ok(Contents { objects, problems })
}

/// Reads what is `wanted` of the folder, then follows its changes, until the store is gone.
pub async fn run(dir: PathBuf, mut wanted: Wanted, out: Sender, readiness: Readiness) -> Result<(), Error> {
    let (changed, mut changes) = mpsc::channel(1);
    // One pending wake-up is enough: a scan looks at everything.
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        if !event.is_ok_and(|event| event.kind.is_access()) {
            _ = changed.try_send(());
        }
    })?;
    let read_error = |source| Error::Read { path: dir.clone(), source };
    fs::metadata(&dir).map_err(read_error)?;
    watcher.watch(&dir, RecursiveMode::Recursive)?;

    let mut folder = Folder::new(dir);
    let mut first = true;
    // Feeds that were not listed yet.
    let mut fresh = BTreeSet::new();
    let mut watched = identity(&folder.dir);
    loop {
        folder.turn(wanted.borrow_and_update().clone(), &mut fresh);
        let scanned = tokio::task::spawn_blocking(move || {
            let events = folder.scan();
            (folder, events)
        });
        let Ok((back, events)) = scanned.await else { return Ok(()) };
        folder = back;
        let (events, problem) = match events {
            Ok(events) => (events, None),
            Err(error) if first => return Err(error),
            Err(error) => (Vec::new(), Some(error.to_string())),
        };
        first = false;
        let was_read = problem.is_none();
        let listed = if was_read { std::mem::take(&mut fresh) } else { BTreeSet::new() };
        readiness.problem(&folder.dir.display().to_string(), problem);
        folder.report(&readiness);
        let begin = listed.iter().map(|id| (*id, Event::Init));
        let end = listed.iter().map(|id| (*id, Event::InitDone));
        let all: Vec<_> = if was_read { folder.feeds.keys().copied().collect() } else { Vec::new() };
        let quiet = all.into_iter().map(|id| (id, Event::Quiet));
        for (id, event) in begin.chain(events).chain(end).chain(quiet) {
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
        let settled = Instant::now() + FOLDER_SETTLE_MAX;
        while Instant::now() < settled && tokio::time::timeout(FOLDER_SETTLE, changes.recv()).await.is_ok() {}
        let now = identity(&folder.dir);
        if now != watched && now.is_some() {
            // Another folder has taken its place: the system still watches the one before.
            _ = watcher.unwatch(&folder.dir);
            watcher.watch(&folder.dir, RecursiveMode::Recursive)?;
            watched = now;
        }
    }
}

/// Mostly it is not only equal but the one text that was read.
fn is_same(one: &Bytes, other: &Bytes) -> bool {
    (one.as_ptr(), one.len()) == (other.as_ptr(), other.len()) || one == other
}

/// Which folder lies at the path now.
fn identity(dir: &Path) -> Option<(u64, u64)> {
    fs::metadata(dir).ok().map(|folder| (folder.dev(), folder.ino()))
}

/// What was read, file by file, and what was said of it.
struct Folder {
    dir: PathBuf,
    feeds: BTreeMap<WatchId, Feed>,
    files: BTreeMap<PathBuf, File>,
    held: BTreeMap<WatchId, HashMap<ObjectKey, Object>>,
    /// Folders below that cannot be read, and why.
    unreadable: BTreeMap<PathBuf, String>,
    /// Subjects of the problems reported last.
    said: BTreeSet<String>,
}

struct File {
    stamp: Stamp,
    /// The last good content.
    manifests: Vec<Manifest>,
    problem: Option<String>,
    /// Objects that another place already gives, and bundles that are not understood.
    refused: Vec<String>,
}

/// Changes whenever the file's content may have.
type Stamp = (Option<SystemTime>, u64, u64);

/// That of no file.
const UNREAD: Stamp = (None, 0, 0);

impl Folder {
    fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            held: BTreeMap::new(),
            feeds: BTreeMap::new(),
            files: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            said: BTreeSet::new(),
        }
    }

    /// Turns to what is wanted now. What is new is `fresh`.
    fn turn(&mut self, wanted: BTreeMap<WatchId, Feed>, fresh: &mut BTreeSet<WatchId>) {
        fresh.extend(wanted.keys().filter(|id| !self.feeds.contains_key(id)));
        fresh.retain(|id| wanted.contains_key(id));
        self.held.retain(|id, _| wanted.contains_key(id));
        self.feeds = wanted;
    }

    /// Reads what changed, and says what that changes feed by feed.
    fn scan(&mut self) -> Result<Vec<(WatchId, Event)>, Error> {
        let mut found = BTreeMap::new();
        let mut unreadable = BTreeMap::new();
        find(&self.dir, &mut found, &mut unreadable)?;
        // What lies in a folder that cannot be read now keeps its last good content too.
        self.files
            .retain(|path, _| found.contains_key(path) || unreadable.keys().any(|dir| path.starts_with(dir)));
        self.unreadable = unreadable;
        for (path, stamp) in found {
            let file = self.files.entry(path.clone()).or_insert(File {
                stamp: UNREAD,
                manifests: Vec::new(),
                problem: None,
                refused: Vec::new(),
            });
            if file.stamp != stamp || stamp.0.is_none() {
                file.stamp = stamp;
                match read(&path) {
                    Ok(manifests) => (file.manifests, file.problem) = (manifests, None),
                    Err(problem) => {
                        file.problem = Some(problem);
                        // Rights, or a lack of file descriptors, change without the stamp.
                        if std::fs::File::open(&path).is_err() {
                            file.stamp = UNREAD;
                        }
                    }
                }
            }
        }
        Ok(self.events())
    }

    fn events(&mut self) -> Vec<(WatchId, Event)> {
        let kinds = Kinds::of(self.files.values().flat_map(|file| &file.manifests));
        let mut events = Vec::new();
        for file in self.files.values_mut() {
            // No watch asks for it, and nobody else would tell.
            let unknown = file.manifests.iter().filter(|manifest| manifest.is_unknown_bundle());
            file.refused = unknown
                .map(|manifest| {
                    format!("document {}: {}", manifest.document, spec::Error::Kind(manifest.to_string()))
                })
                .collect();
        }
        for (id, feed) in &self.feeds {
            let mut places: HashMap<ObjectKey, (&Path, usize)> = HashMap::new();
            let mut now: HashMap<ObjectKey, Object> = HashMap::new();
            let mut selects = kinds.selection(feed);
            for (path, file) in &mut self.files {
                for manifest in file.manifests.iter().filter(|manifest| selects(manifest)) {
                    let mut object = manifest.object.clone();
                    if feed.scope == Scope::Cluster
                        || feed.resource.is_named_only() && kinds.is_cluster_scoped(manifest)
                    {
                        object.key.namespace = "".into();
                    } else if object.key.namespace.is_empty() {
                        object.key.namespace = DEFAULT_NAMESPACE.into();
                    }
                    if let Some((other, document)) = places.get(&object.key) {
                        file.refused.push(format!(
                            "document {}: {} {} is already given by {} document {document}; remove one of the two",
                            manifest.document,
                            manifest.kind,
                            object.key,
                            other.display()
                        ));
                        continue;
                    }
                    places.insert(object.key.clone(), (path, manifest.document));
                    now.insert(object.key.clone(), object);
                }
            }
            let before = self.held.entry(*id).or_default();
            let gone = before.keys().filter(|key| !now.contains_key(*key));
            events.extend(gone.map(|key| (*id, Event::Delete(key.clone()))));
            let new = now.values().filter(|object| {
                before.get(&object.key).is_none_or(|held| !is_same(&held.json, &object.json))
            });
            events.extend(new.map(|object| (*id, Event::Apply(object.clone()))));
            *before = now;
        }
        events
    }

    fn report(&mut self, readiness: &Readiness) {
        let mut now = BTreeSet::new();
        let files = self
            .files
            .iter()
            .map(|(path, file)| (path, file.problem.iter().chain(&file.refused).cloned().collect()));
        let folders = self.unreadable.iter().map(|(path, problem)| (path, vec![problem.clone()]));
        for (path, messages) in files.chain(folders) {
            let messages: Vec<String> = messages;
            if messages.is_empty() {
                continue;
            }
            let subject = path.display().to_string();
            let message = messages.join("; ");
            if readiness.is_news(&subject, &message) {
                tracing::warn!(file = subject, message, "refused");
            }
            readiness.problem(&subject, Some(message));
            now.insert(subject);
        }
        for subject in self.said.difference(&now) {
            readiness.problem(subject, None);
        }
        self.said = now;
    }
}

/// The manifest files below `dir` with their stamps. Hidden files are no manifests, nor is the `..data` folder by
/// which a mounted ConfigMap swaps its files; the links to them are.
fn find(
    dir: &Path,
    found: &mut BTreeMap<PathBuf, Stamp>,
    unreadable: &mut BTreeMap<PathBuf, String>,
) -> Result<(), Error> {
    let wrap = |source| Error::Read { path: dir.to_owned(), source };
    for entry in fs::read_dir(dir).map_err(wrap)? {
        let entry = entry.map_err(wrap)?;
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        // A file may vanish between listing and looking: then it is not there.
        let Ok(metadata) = fs::metadata(&path) else { continue };
        if metadata.is_dir() {
            // A link to a folder may lead in a circle.
            if path.is_symlink() {
                continue;
            }
            match find(&path, found, unreadable) {
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

/// The objects of one file.
pub fn read_file(path: &Path) -> Result<Vec<Object>, String> {
    Ok(read(path)?.into_iter().map(|manifest| manifest.object).collect())
}

fn read(path: &Path) -> Result<Vec<Manifest>, String> {
    let length = fs::metadata(path).map_err(|error| error.to_string())?.len();
    if length > MANIFEST_BYTES_MAX {
        return Err(format!(
            "{length} bytes are more than the {MANIFEST_BYTES_MAX} that a manifest file may have"
        ));
    }
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    let json = path.extension().is_some_and(|ext| ext == "json");
    if json { manifest::parse_json(&text) } else { manifest::parse_yaml(&text) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::{Content, Resource};

    fn folder(dir: &Path) -> Folder {
        let feed = Feed {
            resource: Resource::configmaps(),
            scope: Scope::Namespaces { ignored: vec!["left-out".into()] },
            labels: Vec::new(),
            content: Content::Data,
        };
        let mut folder = Folder::new(dir.to_owned());
        folder.feeds.insert(WatchId(0), feed);
        folder
    }

    fn configmap(namespace: &str, name: &str, value: &str) -> String {
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: \"{name}\", namespace: {namespace}}}\ndata: {{k: {value}}}\n"
        )
    }

    /// Writes files, scans, and tells the events and problems in words.
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
        let said: Vec<_> =
            folder.files.values().flat_map(|file| file.problem.iter().chain(&file.refused)).collect();
        assert_eq!(said.len(), problems.len(), "{said:?}");
        for (said, part) in said.iter().zip(problems) {
            assert!(said.contains(part), "{said}");
        }
    }

    #[test]
    fn follows_files_and_keeps_the_last_good() {
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
            &["document 2", "already given"],
        );
        check(&mut folder, &[("a.yaml", None)], &["+a/x", "-a/y"], &[]);
        let later = r#"{"apiVersion":"opahub.dev/v2","kind":"Bundle","metadata":{"name":"b"}}"#;
        check(&mut folder, &[("later.json", Some(later))], &[], &["opahub.dev/v2 Bundle is not supported"]);
        check(&mut folder, &[("later.json", None)], &[], &[]);
        let list = r#"{"apiVersion":"v1","kind":"ConfigMapList","items":[{"metadata":{"name":"z"}}]}"#;
        check(&mut folder, &[("b.yaml", None), ("c.json", Some(list))], &["+default/z", "-a/x"], &[]);
    }

    proptest! {
        /// I9: whatever a file holds, it is read or refused.
        #[test]
        fn i9_random_files_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..256), text in "[-{}\\[\\]:, \n\"'&*!a-c]{0,64}") {
            for text in [String::from_utf8_lossy(&bytes).into_owned(), text] {
                let _ = manifest::parse_yaml(&text);
                let _ = manifest::parse_json(&text);
            }
        }
    }
}

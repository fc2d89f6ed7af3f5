//! Last good state of one OPA on disk: the data and policies that it was given, frame by frame. An OPA and an agent that
//! restart while no hub answers begin with it.
//!
//! The file is a database (redb) of one whole state: a commit takes all of a change or nothing. Each page has a checksum,
//! and all are verified before a file is believed. A thread of its own writes and syncs, at most once a second: a
//! crash costs that time. What cannot be written is given up and told: no disk stops an OPA.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use opa_hub_proto::frame::Delta;
use opa_hub_proto::head::{DataHead, Head};
use opa_hub_proto::patch::push_json_string;
use opa_hub_proto::path::{DirPath, unescape};
use opa_hub_proto::position::Position;
use opa_hub_proto::revision::{Digest, Revision};
use redb::{
    Builder, Database, Durability, ReadTransaction, ReadableDatabase as _, ReadableTable as _,
    TableDefinition, TableError, WriteTransaction,
};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::archive::{self, Piece};
use crate::config::{CLOSE_MAX, DECODED_AHEAD_MAX, PATCH_BYTES_MAX};
use crate::marker::Marker;
use crate::pull::PolicyBundle;

/// Entries by directory and key, as JSON.
const ENTRIES: TableDefinition<(&str, &str), &[u8]> = TableDefinition::new("entries");
/// Digests of directories.
const DIRS: TableDefinition<&str, &str> = TableDefinition::new("dirs");
/// Texts of modules by id.
const MODULES: TableDefinition<&str, &str> = TableDefinition::new("modules");
/// [`HEAD`] and [`BUNDLE`].
const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
/// Key of the [`Meta`] as JSON.
const HEAD: &str = "head";
/// Key of the policy bundle, where OPA loads one.
const BUNDLE: &str = "bundle";

/// Bytes of pages in memory: more of them make no difference that shows beside OPA.
const CACHE_BYTES: usize = 512 << 10;
/// Maximum number of changes that wait for the disk.
const WAITING_MAX: usize = 16;
/// Maximum time that a change waits for the disk. Then the state is given up.
const WRITE_MAX: Duration = Duration::from_secs(2);
/// Maximum time in which the disk gives what is asked for, the checks of the whole file at a start included. Then the
/// state is given up.
const READ_MAX: Duration = Duration::from_secs(5);
/// Interval of a look at a queue that is full.
const LOOK: Duration = Duration::from_millis(5);
/// Time from the first change that is not synced to the sync: each sync costs the disk a write of its own.
const SYNC_AFTER: Duration = Duration::from_secs(1);
/// Ratio of the file to its content from which it is compacted at a start: writes leave free pages.
const SLACK: u64 = 3;

/// Failure of the file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory cannot be used.
    #[error("cannot use the state directory {}: {source}; give the agent a directory that it may write to", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The database failed.
    #[error("the state cannot be read or written: {0}")]
    Database(#[from] redb::Error),
    /// A value that does not parse.
    #[error("the state does not parse: {0}")]
    Content(#[from] serde_json::Error),
    /// An archive that lacks what the state has another version of.
    #[error("an archive lacks {0}, of which the state has another version")]
    Incomplete(String),
}

impl Error {
    /// Whether the file is none of a whole state, and not only out of reach.
    fn is_damage(&self) -> bool {
        match self {
            Self::Database(redb::Error::Io(error)) => {
                matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof)
            }
            Self::Database(error) => {
                matches!(error, redb::Error::Corrupted(_) | redb::Error::UpgradeRequired(_))
            }
            _ => false,
        }
    }
}

macro_rules! from_redb {
    ($($error:ty),*) => { $(impl From<$error> for Error {
        fn from(error: $error) -> Self {
            Self::Database(error.into())
        }
    })* };
}
from_redb!(
    redb::DatabaseError,
    redb::TransactionError,
    redb::TableError,
    redb::StorageError,
    redb::CommitError,
    redb::CompactionError,
    redb::SetDurabilityError
);

/// Description of a whole state.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub struct Meta {
    /// Revision at the hub.
    pub revision: Revision,
    /// Version of the source.
    #[serde(default, skip_serializing_if = "Position::is_empty")]
    pub position: Position,
    /// Maps that exist even while they are empty.
    pub ensure: Vec<DirPath>,
    /// Version of Rego, where the hub was given one.
    pub rego_version: Option<u8>,
    /// Data that the modules read, in the hub's words.
    pub reads: Option<String>,
    /// ETag of the policy bundle, where OPA loads one.
    pub etag: Option<String>,
}

/// Digests of what the file holds.
#[derive(Default)]
pub struct Content {
    /// The last commit; `None`: nothing is there.
    pub meta: Option<Meta>,
    /// Directories.
    pub dirs: BTreeMap<DirPath, Digest>,
    /// Modules.
    pub modules: BTreeMap<String, Digest>,
    /// The policy bundle, where OPA loads one.
    pub bundle: Option<PolicyBundle>,
}

impl Content {
    /// Leaves of `marker` what is here too, so that a hub sends the rest.
    pub fn intersect(&self, marker: &mut Marker) {
        marker.revision = None;
        for (dir, digest) in &mut marker.dirs {
            *digest = digest.filter(|digest| self.dirs.get(dir) == Some(digest));
        }
        for (id, digest) in &mut marker.modules {
            *digest = digest.filter(|digest| self.modules.get(id) == Some(digest));
        }
    }
}

/// Change of the file.
enum Change {
    Piece(Piece),
    Modules(BTreeMap<String, Option<String>>),
    Bundle(PolicyBundle),
    Delta { dirs: BTreeMap<DirPath, Option<Digest>>, patch: Box<RawValue> },
    Commit(Box<Meta>),
    Abort,
    Ask(oneshot::Sender<Result<Content, Error>>),
    Read(mpsc::Sender<Result<Piece, archive::Error>>),
}

/// See the module's text.
pub struct State {
    /// `None` once it was given up.
    changes: Option<SyncSender<Change>>,
    /// Whether changes were lost, so that the file is no longer what OPA was given.
    is_lost: Arc<AtomicBool>,
    /// Closed by the end of the thread.
    ended: oneshot::Receiver<()>,
}

impl State {
    /// Starts the thread of the state of `bundle` in a directory.
    pub fn open(dir: PathBuf, bundle: &str, namespace: Option<&str>) -> io::Result<Self> {
        let name = namespace.map_or_else(|| bundle.to_owned(), |namespace| format!("{bundle}@{namespace}"));
        let (changes, queue) = sync_channel(WAITING_MAX);
        let is_lost = Arc::new(AtomicBool::new(false));
        let lost = Arc::clone(&is_lost);
        let (end, ended) = oneshot::channel();
        let run = move || {
            let path = dir.join(format!("{name}.redb"));
            let give_up = |error: &Error| {
                tracing::error!(%error, "state given up: a restart without a hub begins with nothing");
            };
            let ended = match open_or_replace(&dir, &path) {
                // The file may be another agent's.
                Err(error) => return give_up(&error),
                Ok(database) => File { database, open: None, unsynced: None }.run(&queue),
            };
            _ = ended.as_ref().inspect_err(|error| give_up(error));
            if ended.is_err() || lost.load(Ordering::Relaxed) {
                // What it holds is not what OPA is given from now on.
                _ = std::fs::remove_file(&path);
            }
            drop(end);
        };
        std::thread::Builder::new().name("state".into()).spawn(run)?;
        Ok(Self { changes: Some(changes), is_lost, ended })
    }

    /// Syncs what was committed and closes the file.
    pub async fn close(mut self) {
        self.changes = None;
        if timeout(CLOSE_MAX, self.ended).await.is_err() {
            tracing::warn!("state not synced: the disk took longer than {CLOSE_MAX:?}");
        }
    }

    fn give_up(&mut self, waited: Duration) {
        tracing::error!("state given up: the disk did nothing for {waited:?}");
        self.is_lost.store(true, Ordering::Relaxed);
        self.changes = None;
    }

    async fn send(&mut self, mut change: Change) {
        if self.is_lost.load(Ordering::Relaxed) {
            self.changes = None;
        }
        let until = Instant::now() + WRITE_MAX;
        while let Some(changes) = &self.changes {
            change = match changes.try_send(change) {
                Ok(()) => return,
                Err(TrySendError::Full(change)) if Instant::now() < until => change,
                Err(TrySendError::Full(_)) => return self.give_up(WRITE_MAX),
                Err(TrySendError::Disconnected(_)) => {
                    self.changes = None;
                    return;
                }
            };
            tokio::time::sleep(LOOK).await;
        }
    }

    /// What it holds.
    pub async fn content(&mut self) -> Content {
        let (answer, content) = oneshot::channel();
        self.send(Change::Ask(answer)).await;
        if let Ok(content) = timeout(READ_MAX, content).await {
            return content.ok().and_then(Result::ok).unwrap_or_default();
        }
        self.give_up(READ_MAX);
        Content::default()
    }

    /// All that it holds, as a hub sends it.
    pub async fn read(&mut self) -> mpsc::Receiver<Result<Piece, archive::Error>> {
        let (out, mut pieces) = mpsc::channel(DECODED_AHEAD_MAX);
        self.send(Change::Read(out)).await;
        let (out, bounded) = mpsc::channel(1);
        let is_lost = Arc::clone(&self.is_lost);
        tokio::spawn(async move {
            loop {
                let piece = match timeout(READ_MAX, pieces.recv()).await {
                    Ok(None) => return,
                    Ok(Some(piece)) => piece,
                    Err(_) => {
                        is_lost.store(true, Ordering::Relaxed);
                        Err(io::Error::other(format!("the disk read nothing for {READ_MAX:?}")).into())
                    }
                };
                let is_end = piece.is_err();
                if out.send(piece).await.is_err() || is_end {
                    return;
                }
            }
        });
        bounded
    }

    /// Takes a piece of an archive.
    pub async fn piece(&mut self, piece: &Piece) {
        self.send(Change::Piece(piece.clone())).await;
    }

    /// Takes modules: texts, or `None` for those that go.
    pub async fn modules(&mut self, changes: BTreeMap<String, Option<String>>) {
        self.send(Change::Modules(changes)).await;
    }

    /// Takes the policy bundle.
    pub async fn bundle(&mut self, bundle: PolicyBundle) {
        self.send(Change::Bundle(bundle)).await;
    }

    /// Takes a frame of data.
    pub async fn delta(&mut self, delta: &Delta<'_>) {
        let change = Change::Delta { dirs: delta.dirs.clone(), patch: delta.patch.to_owned() };
        self.send(change).await;
    }

    /// Makes all changes since the last commit one whole state.
    pub async fn commit(&mut self, meta: Meta) {
        self.send(Change::Commit(Box::new(meta))).await;
    }

    /// Forgets changes since the last commit.
    pub async fn abort(&mut self) {
        self.send(Change::Abort).await;
    }
}

/// Opens a file in a directory, which is made where it is not there. A damaged file is removed.
fn open_or_replace(dir: &Path, path: &Path) -> Result<Database, Error> {
    let wrong = |source| Error::Directory { path: dir.to_owned(), source };
    std::fs::create_dir_all(dir).map_err(wrong)?;
    match open(path) {
        Err(error) if error.is_damage() => {
            tracing::warn!(path = %path.display(), %error, "state is damaged, removing it");
            std::fs::remove_file(path).map_err(wrong)?;
            open(path)
        }
        other => other,
    }
}

fn open(path: &Path) -> Result<Database, Error> {
    let mut database =
        Builder::new().set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true).create(path)?;
    let stored = {
        let write = database.begin_write()?;
        let stats = write.stats()?;
        write.abort()?;
        stats.stored_bytes() + stats.metadata_bytes()
    };
    let size = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    if size > stored.max(1 << 20) * SLACK {
        database.compact()?;
    }
    Ok(database)
}

/// The thread's side.
struct File {
    database: Database,
    open: Option<Open>,
    /// Time of the first commit that is not synced.
    unsynced: Option<Instant>,
}

/// Changes since the last commit.
struct Open {
    write: WriteTransaction,
    /// Directories and modules of an archive that have not come yet.
    missing: BTreeSet<String>,
    /// The directory whose entries come.
    current: Option<DirPath>,
}

impl File {
    fn run(mut self, changes: &Receiver<Change>) -> Result<(), Error> {
        loop {
            let wait = self.unsynced.map(|since| SYNC_AFTER.saturating_sub(since.elapsed()));
            let change = match wait {
                Some(wait) => changes.recv_timeout(wait),
                None => changes.recv().map_err(RecvTimeoutError::from),
            };
            match change {
                Ok(change) => self.take(change)?,
                Err(RecvTimeoutError::Timeout) if self.open.is_none() => self.sync()?,
                Err(RecvTimeoutError::Timeout) => self.unsynced = Some(Instant::now()),
                Err(RecvTimeoutError::Disconnected) => return self.sync(),
            }
        }
    }

    fn take(&mut self, change: Change) -> Result<(), Error> {
        match change {
            Change::Piece(piece) => self.open()?.piece(piece),
            Change::Modules(changes) => self.open()?.modules(changes),
            Change::Bundle(PolicyBundle { archive, .. }) => {
                let write = &self.open()?.write;
                write.open_table(META)?.insert(BUNDLE, &archive[..])?;
                Ok(())
            }
            Change::Delta { dirs, patch } => self.open()?.delta(&dirs, &patch),
            Change::Commit(meta) => self.commit(&meta),
            Change::Abort => {
                if let Some(open) = self.open.take() {
                    open.write.abort()?;
                }
                Ok(())
            }
            Change::Ask(answer) => {
                _ = answer.send(content(&self.database.begin_read()?));
                Ok(())
            }
            Change::Read(out) => {
                let read = self.database.begin_read()?;
                // The reader may end first.
                let sent = pieces(&read, &mut |piece| out.blocking_send(Ok(piece)).is_ok());
                if let Err(error) = &sent {
                    _ = out.blocking_send(Err(io::Error::other(error.to_string()).into()));
                }
                sent
            }
        }
    }

    fn open(&mut self) -> Result<&mut Open, Error> {
        let open = if let Some(open) = self.open.take() {
            open
        } else {
            let mut write = self.database.begin_write()?;
            write.set_durability(Durability::None)?;
            Open { write, missing: BTreeSet::new(), current: None }
        };
        Ok(self.open.insert(open))
    }

    fn commit(&mut self, meta: &Meta) -> Result<(), Error> {
        let open = self.open()?;
        if let Some(missing) = open.missing.pop_first() {
            return Err(Error::Incomplete(missing));
        }
        open.write.open_table(META)?.insert(HEAD, &serde_json::to_vec(meta)?[..])?;
        if let Some(open) = self.open.take() {
            open.write.commit()?;
        }
        self.unsynced.get_or_insert_with(Instant::now);
        Ok(())
    }

    fn sync(&mut self) -> Result<(), Error> {
        self.open = None;
        if self.unsynced.take().is_some() {
            let mut write = self.database.begin_write()?;
            write.set_durability(Durability::Immediate)?;
            write.commit()?;
        }
        Ok(())
    }
}

impl Open {
    fn piece(&mut self, piece: Piece) -> Result<(), Error> {
        match piece {
            Piece::Head(head) => self.head(head),
            Piece::Module { id, text } => {
                self.missing.remove(&id);
                self.modules(BTreeMap::from([(id, Some(text))]))
            }
            Piece::Directory(dir, json) => {
                self.missing.remove(dir.as_str());
                self.replace(dir.as_str(), &json)
            }
            Piece::Begin(dir) => {
                self.missing.remove(dir.as_str());
                self.clear(dir.as_str())?;
                self.current = Some(dir);
                Ok(())
            }
            Piece::Entry(key, value) => {
                if let Some(dir) = &self.current {
                    self.write.open_table(ENTRIES)?.insert((dir.as_str(), key.as_str()), &value[..])?;
                }
                Ok(())
            }
            Piece::End => Ok(()),
        }
    }

    /// Takes away what an archive leaves out, and notes what it must bring.
    fn head(&mut self, head: Head) -> Result<(), Error> {
        let Some(data) = head.data else { return Ok(()) };
        let held = digests(&self.write.open_table(DIRS)?)?;
        let mut gone: Vec<DirPath> =
            held.keys().filter(|dir| !data.dirs.contains_key(*dir)).cloned().collect();
        let mut dirs = self.write.open_table(DIRS)?;
        for (dir, digest) in &data.dirs {
            if held.get(dir) != Some(digest) {
                self.missing.insert(dir.as_str().to_owned());
                dirs.insert(dir.as_str(), digest.to_string().as_str())?;
            }
        }
        for dir in &gone {
            dirs.remove(dir.as_str())?;
        }
        drop(dirs);
        gone.drain(..).try_for_each(|dir| self.clear(dir.as_str()))?;
        let mut modules = self.write.open_table(MODULES)?;
        let all = head.modules.unwrap_or_default();
        modules.retain(|id, text| all.get(id) == Some(&Digest::of(text.as_bytes())))?;
        for id in all.into_keys() {
            if modules.get(id.as_str())?.is_none() {
                self.missing.insert(id);
            }
        }
        Ok(())
    }

    fn modules(&mut self, changes: BTreeMap<String, Option<String>>) -> Result<(), Error> {
        let mut modules = self.write.open_table(MODULES)?;
        for (id, text) in changes {
            match text {
                Some(text) => drop(modules.insert(id.as_str(), text.as_str())?),
                None => drop(modules.remove(id.as_str())?),
            }
        }
        Ok(())
    }

    fn clear(&self, dir: &str) -> Result<(), Error> {
        let end = format!("{dir}\0");
        self.write.open_table(ENTRIES)?.retain_in((dir, "")..(end.as_str(), ""), |_, _| false)?;
        Ok(())
    }

    fn replace(&self, dir: &str, json: &[u8]) -> Result<(), Error> {
        self.clear(dir)?;
        let entries: BTreeMap<String, &RawValue> = serde_json::from_slice(json)?;
        let mut table = self.write.open_table(ENTRIES)?;
        for (key, value) in entries {
            table.insert((dir, key.as_str()), value.get().as_bytes())?;
        }
        Ok(())
    }

    fn delta(&mut self, dirs: &BTreeMap<DirPath, Option<Digest>>, patch: &RawValue) -> Result<(), Error> {
        #[derive(Deserialize)]
        struct Op<'a> {
            path: String,
            #[serde(borrow, default, deserialize_with = "present")]
            value: Option<&'a RawValue>,
        }
        /// Keeps `null`, which is a value: only an operation without one removes.
        fn present<'de, D: Deserializer<'de>>(value: D) -> Result<Option<&'de RawValue>, D::Error> {
            <&RawValue>::deserialize(value).map(Some)
        }
        for Op { path, value } in serde_json::from_str::<Vec<Op>>(patch.get())? {
            // An operation belongs to the innermost directory. Those that go are cleared below.
            let ends = path.match_indices('/').map(|(at, _)| at).chain([path.len()]).rev();
            let mut inner = ends.map(|end| path.split_at(end));
            let Some((dir, below)) = inner.find(|(dir, _)| stays(dirs, dir)) else { continue };
            let mut tokens = below.split('/').skip(1).map(unescape);
            let Some(key) = tokens.next() else {
                match value {
                    Some(value) => self.replace(dir, value.get().as_bytes())?,
                    None => self.clear(dir)?,
                }
                continue;
            };
            let mut table = self.write.open_table(ENTRIES)?;
            let tokens: Vec<_> = tokens.collect();
            let edited = match table.get((dir, key.as_ref()))? {
                Some(held) if !tokens.is_empty() => Some(edited(held.value(), &tokens, value)?),
                _ => None,
            };
            match edited.as_deref().or(value.map(RawValue::get)) {
                Some(value) => drop(table.insert((dir, key.as_ref()), value.as_bytes())?),
                None => drop(table.remove((dir, key.as_ref()))?),
            }
        }
        let mut table = self.write.open_table(DIRS)?;
        for (dir, digest) in dirs {
            if let Some(digest) = digest {
                table.insert(dir.as_str(), digest.to_string().as_str())?;
            } else {
                table.remove(dir.as_str())?;
                self.clear(dir.as_str())?;
            }
        }
        Ok(())
    }
}

fn stays(dirs: &BTreeMap<DirPath, Option<Digest>>, dir: &str) -> bool {
    dir.parse().is_ok_and(|dir: DirPath| dirs.get(&dir).is_some_and(Option::is_some))
}

/// The JSON object `object` with the member at the end of `path` set to `value`, or removed.
fn edited(object: &[u8], path: &[Cow<'_, str>], value: Option<&RawValue>) -> serde_json::Result<String> {
    let mut members: BTreeMap<Cow<'_, str>, &RawValue> = serde_json::from_slice(object)?;
    let inner;
    let (name, rest) = path.split_first().expect("a path of a member");
    let value = match members.get(name) {
        Some(member) if !rest.is_empty() => {
            inner = RawValue::from_string(edited(member.get().as_bytes(), rest, value)?)?;
            Some(&*inner)
        }
        _ => value,
    };
    match value {
        Some(value) => drop(members.insert(name.clone(), value)),
        None => drop(members.remove(name)),
    }
    serde_json::to_string(&members)
}

fn digests(
    table: &impl redb::ReadableTable<&'static str, &'static str>,
) -> Result<BTreeMap<DirPath, Digest>, Error> {
    let mut dirs = BTreeMap::new();
    for entry in table.iter()? {
        let (dir, digest) = entry?;
        if let (Ok(dir), Ok(digest)) = (dir.value().parse(), digest.value().parse()) {
            dirs.insert(dir, digest);
        }
    }
    Ok(dirs)
}

fn meta(read: &ReadTransaction) -> Result<Option<Meta>, Error> {
    let table = match read.open_table(META) {
        Err(TableError::TableDoesNotExist(_)) => return Ok(None),
        table => table?,
    };
    let head = table.get(HEAD)?;
    Ok(head.map(|head| serde_json::from_slice(head.value())).transpose()?)
}

fn content(read: &ReadTransaction) -> Result<Content, Error> {
    let Some(meta) = meta(read)? else { return Ok(Content::default()) };
    let mut content = Content { meta: Some(meta), bundle: bundle(read)?, ..Content::default() };
    content.dirs = digests(&read.open_table(DIRS)?)?;
    for entry in read.open_table(MODULES)?.iter()? {
        let (id, text) = entry?;
        content.modules.insert(id.value().to_owned(), Digest::of(text.value().as_bytes()));
    }
    Ok(content)
}

fn bundle(read: &ReadTransaction) -> Result<Option<PolicyBundle>, Error> {
    let Some(Meta { etag: Some(etag), .. }) = meta(read)? else { return Ok(None) };
    let table = read.open_table(META)?;
    let archive = table.get(BUNDLE)?;
    Ok(archive.map(|archive| PolicyBundle { etag, archive: archive.value().to_vec().into() }))
}

/// Gives all of it to `take`, until that wants no more.
fn pieces(read: &ReadTransaction, take: &mut dyn FnMut(Piece) -> bool) -> Result<(), Error> {
    let Content { meta: Some(meta), dirs, modules, .. } = content(read)? else { return Ok(()) };
    let Meta { revision, ensure, rego_version, reads, .. } = meta;
    let data = Some(DataHead { dirs: dirs.clone(), ensure });
    let head =
        Head { data, modules: Some(modules), modules_digest: Some(revision.modules), reads, rego_version };
    if !take(Piece::Head(head)) {
        return Ok(());
    }
    for entry in read.open_table(MODULES)?.iter()? {
        let (id, text) = entry?;
        if !take(Piece::Module { id: id.value().to_owned(), text: text.value().to_owned() }) {
            return Ok(());
        }
    }
    let entries = read.open_table(ENTRIES)?;
    for dir in dirs.into_keys() {
        let end = format!("{dir}\0");
        let of_dir = || entries.range((dir.as_str(), "")..(end.as_str(), ""));
        let mut bytes = 2;
        for entry in of_dir()? {
            let (key, value) = entry?;
            bytes += key.value().1.len() + value.value().len() + 4;
        }
        if bytes > PATCH_BYTES_MAX {
            if !take(Piece::Begin(dir.clone())) {
                return Ok(());
            }
            for entry in of_dir()? {
                let (key, value) = entry?;
                if !take(Piece::Entry(key.value().1.to_owned(), value.value().to_vec())) {
                    return Ok(());
                }
            }
            if !take(Piece::End) {
                return Ok(());
            }
            continue;
        }
        let mut json = Vec::with_capacity(bytes);
        json.push(b'{');
        for entry in of_dir()? {
            let (key, value) = entry?;
            if json.len() > 1 {
                json.push(b',');
            }
            push_json_string(&mut json, key.value().1);
            json.push(b':');
            json.extend_from_slice(value.value());
        }
        json.push(b'}');
        if !take(Piece::Directory(dir, json)) {
            return Ok(());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;

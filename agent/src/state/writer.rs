//! Writer thread.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use opa_hub_proto::path::DirPath;
use opa_hub_proto::revision::Digest;
use redb::{Builder, Database, Durability, ReadableDatabase as _};
use serde_json::value::RawValue;
use tokio::sync::{mpsc, oneshot};

use super::draft::Draft;
use super::error::Error;
use super::reader::{read_pieces, read_summary};
use super::tables::{BUNDLE, HEAD, META, Meta, StateSummary};
use crate::archive::{self, Piece, PolicyBundle};

/// Page cache: more is not measurably faster.
const CACHE_BYTES: usize = 512 << 10;
/// Delay of a sync after a commit: each costs a disk write.
const SYNC_DELAY: Duration = Duration::from_secs(1);
/// Ratio of file to content that leads to compaction at the start: writes leave free pages.
const COMPACTION_RATIO: u64 = 3;

pub(super) enum Command {
    WritePiece(Piece),
    WriteModules(BTreeMap<String, Option<String>>),
    WriteBundle(PolicyBundle),
    ApplyDelta { dirs: BTreeMap<DirPath, Option<Digest>>, patch: Box<RawValue> },
    Commit(Box<Meta>),
    Abort,
    Summarize(oneshot::Sender<Result<StateSummary, Error>>),
    Read(mpsc::Sender<Result<Piece, archive::Error>>),
}

/// Replaces a corrupt file.
pub(super) fn open_or_replace(dir: &Path, path: &Path) -> Result<Database, Error> {
    let failed = |source| Error::Directory { path: dir.to_owned(), source };
    std::fs::create_dir_all(dir).map_err(failed)?;
    match open(path) {
        Err(error) if error.is_corruption() => {
            tracing::warn!(path = %path.display(), %error, "state is damaged, removing it");
            std::fs::remove_file(path).map_err(failed)?;
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
    if size > stored.max(1 << 20) * COMPACTION_RATIO {
        database.compact()?;
    }
    Ok(database)
}

pub(super) struct Writer {
    database: Database,
    draft: Option<Draft>,
    unsynced_since: Option<Instant>,
}

impl Writer {
    pub(super) fn new(database: Database) -> Self {
        Self { database, draft: None, unsynced_since: None }
    }

    /// Ends with a sync when the sender is dropped.
    pub(super) fn run(mut self, commands: &Receiver<Command>) -> Result<(), Error> {
        loop {
            let wait = self.unsynced_since.map(|since| SYNC_DELAY.saturating_sub(since.elapsed()));
            let command = match wait {
                Some(wait) => commands.recv_timeout(wait),
                None => commands.recv().map_err(RecvTimeoutError::from),
            };
            match command {
                Ok(command) => self.execute(command)?,
                Err(RecvTimeoutError::Timeout) if self.draft.is_none() => self.sync()?,
                Err(RecvTimeoutError::Timeout) => self.unsynced_since = Some(Instant::now()),
                Err(RecvTimeoutError::Disconnected) => return self.sync(),
            }
        }
    }

    fn execute(&mut self, command: Command) -> Result<(), Error> {
        match command {
            Command::WritePiece(piece) => self.draft()?.apply_piece(piece),
            Command::WriteModules(changes) => self.draft()?.apply_modules(changes),
            Command::WriteBundle(PolicyBundle { archive, .. }) => {
                let write = &self.draft()?.write;
                write.open_table(META)?.insert(BUNDLE, &archive[..])?;
                Ok(())
            }
            Command::ApplyDelta { dirs, patch } => self.draft()?.apply_delta(&dirs, &patch),
            Command::Commit(meta) => self.commit(&meta),
            Command::Abort => {
                if let Some(draft) = self.draft.take() {
                    draft.write.abort()?;
                }
                Ok(())
            }
            Command::Summarize(out) => {
                _ = out.send(read_summary(&self.database.begin_read()?));
                Ok(())
            }
            Command::Read(out) => {
                let read = self.database.begin_read()?;
                // The receiver may be dropped first.
                let result = read_pieces(&read, &mut |piece| out.blocking_send(Ok(piece)).is_ok());
                if let Err(error) = &result {
                    _ = out.blocking_send(Err(io::Error::other(error.to_string()).into()));
                }
                result
            }
        }
    }

    fn draft(&mut self) -> Result<&mut Draft, Error> {
        let draft = if let Some(draft) = self.draft.take() {
            draft
        } else {
            let mut write = self.database.begin_write()?;
            write.set_durability(Durability::None)?;
            Draft::new(write)
        };
        Ok(self.draft.insert(draft))
    }

    fn commit(&mut self, meta: &Meta) -> Result<(), Error> {
        let draft = self.draft()?;
        draft.check_complete()?;
        draft.write.open_table(META)?.insert(HEAD, &serde_json::to_vec(meta)?[..])?;
        if let Some(draft) = self.draft.take() {
            draft.write.commit()?;
        }
        self.unsynced_since.get_or_insert_with(Instant::now);
        Ok(())
    }

    fn sync(&mut self) -> Result<(), Error> {
        self.draft = None;
        if self.unsynced_since.take().is_some() {
            let mut write = self.database.begin_write()?;
            write.set_durability(Durability::Immediate)?;
            write.commit()?;
        }
        Ok(())
    }
}

//! Handle of the writer thread.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use opa_hub_proto::frame::Delta;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::error::Error;
use super::tables::{Meta, StateSummary};
use super::writer::{Command, Writer, open_or_replace};
use crate::archive::{self, DECODED_AHEAD_MAX, Piece, PolicyBundle};

const QUEUED_MAX: usize = 16;
/// Maximum wait for the queue.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum time of a read, including verification of the file.
const READ_TIMEOUT: Duration = Duration::from_secs(5);
const QUEUE_POLL_INTERVAL: Duration = Duration::from_millis(5);
/// Maximum time of the last sync: a kubelet waits 30 s before SIGKILL.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Last good state of one OPA.
pub struct StateStore {
    /// `None` if discarded.
    commands: Option<SyncSender<Command>>,
    /// Whether the file differs from OPA.
    is_lost: Arc<AtomicBool>,
    thread_end: oneshot::Receiver<()>,
}

impl StateStore {
    /// Starts the writer of `bundle`.
    pub fn open(dir: PathBuf, bundle: &str, namespace: Option<&str>) -> io::Result<Self> {
        let name = namespace.map_or_else(|| bundle.to_owned(), |namespace| format!("{bundle}@{namespace}"));
        let (commands, queue) = sync_channel(QUEUED_MAX);
        let is_lost = Arc::new(AtomicBool::new(false));
        let lost = Arc::clone(&is_lost);
        let (end, thread_end) = oneshot::channel();
        let run = move || {
            let path = dir.join(format!("{name}.redb"));
            let report = |error: &Error| {
                tracing::error!(%error, "state discarded, restarts need a hub");
            };
            let result = match open_or_replace(&dir, &path) {
                // Another agent may use the file.
                Err(error) => return report(&error),
                Ok(database) => Writer::new(database).run(&queue),
            };
            _ = result.as_ref().inspect_err(|error| report(error));
            if result.is_err() || lost.load(Ordering::Relaxed) {
                _ = std::fs::remove_file(&path);
            }
            drop(end);
        };
        std::thread::Builder::new().name("state".into()).spawn(run)?;
        Ok(Self { commands: Some(commands), is_lost, thread_end })
    }

    /// Syncs and closes the file.
    pub async fn close(mut self) {
        self.commands = None;
        if timeout(CLOSE_TIMEOUT, self.thread_end).await.is_err() {
            tracing::warn!(elapsed = ?CLOSE_TIMEOUT, "syncing the state timed out");
        }
    }

    fn discard(&mut self, waited: Duration) {
        tracing::error!(reason = "the disk does not respond", elapsed = ?waited, "state discarded");
        self.is_lost.store(true, Ordering::Relaxed);
        self.commands = None;
    }

    async fn send(&mut self, mut command: Command) {
        if self.is_lost.load(Ordering::Relaxed) {
            self.commands = None;
        }
        let deadline = Instant::now() + WRITE_TIMEOUT;
        while let Some(commands) = &self.commands {
            command = match commands.try_send(command) {
                Ok(()) => return,
                Err(TrySendError::Full(command)) if Instant::now() < deadline => command,
                Err(TrySendError::Full(_)) => return self.discard(WRITE_TIMEOUT),
                Err(TrySendError::Disconnected(_)) => {
                    self.commands = None;
                    return;
                }
            };
            tokio::time::sleep(QUEUE_POLL_INTERVAL).await;
        }
    }

    pub(crate) async fn summary(&mut self) -> StateSummary {
        let (out, summary) = oneshot::channel();
        self.send(Command::Summarize(out)).await;
        if let Ok(summary) = timeout(READ_TIMEOUT, summary).await {
            return summary.ok().and_then(Result::ok).unwrap_or_default();
        }
        self.discard(READ_TIMEOUT);
        StateSummary::default()
    }

    pub(crate) async fn read(&mut self) -> mpsc::Receiver<Result<Piece, archive::Error>> {
        let (out, mut pieces) = mpsc::channel(DECODED_AHEAD_MAX);
        self.send(Command::Read(out)).await;
        let (out, bounded) = mpsc::channel(1);
        let is_lost = Arc::clone(&self.is_lost);
        tokio::spawn(async move {
            loop {
                let piece = match timeout(READ_TIMEOUT, pieces.recv()).await {
                    Ok(None) => return,
                    Ok(Some(piece)) => piece,
                    Err(_) => {
                        is_lost.store(true, Ordering::Relaxed);
                        let seconds = READ_TIMEOUT.as_secs();
                        Err(io::Error::other(format!("the disk returned nothing for {seconds} s")).into())
                    }
                };
                let is_last = piece.is_err();
                if out.send(piece).await.is_err() || is_last {
                    return;
                }
            }
        });
        bounded
    }

    /// Writes part of an archive.
    pub async fn write_piece(&mut self, piece: &Piece) {
        self.send(Command::WritePiece(piece.clone())).await;
    }

    /// `None` removes a module.
    pub(crate) async fn write_modules(&mut self, changes: BTreeMap<String, Option<String>>) {
        self.send(Command::WriteModules(changes)).await;
    }

    pub(crate) async fn write_bundle(&mut self, bundle: PolicyBundle) {
        self.send(Command::WriteBundle(bundle)).await;
    }

    pub(crate) async fn apply_delta(&mut self, delta: &Delta<'_>) {
        let command = Command::ApplyDelta { dirs: delta.dirs.clone(), patch: delta.patch.to_owned() };
        self.send(command).await;
    }

    /// Commits a complete state.
    pub async fn commit(&mut self, meta: Meta) {
        self.send(Command::Commit(Box::new(meta))).await;
    }

    /// Drops uncommitted changes.
    pub(crate) async fn abort(&mut self) {
        self.send(Command::Abort).await;
    }
}

#[cfg(test)]
mod tests;

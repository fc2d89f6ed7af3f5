//! List and watch of one resource, by streaming list (KEP-3157) or pages. Unlike kube's `watcher` this one reports
//! resource versions, so that no replica moves an agent back, and contact, so that a replica detects isolation. Events,
//! bookmarks and an orderly end prove contact; an accepted request does not.
//!
//! After a failure the server's version is requested; a server that is behind is listed again.

use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::BoxStream;
use kube::Api;
use kube::api::{ListParams, ObjectList, WatchEvent, WatchParams};
use tokio::time::Instant;

use crate::model::Version;
use crate::source::kubernetes::RawObject;
use crate::store::STALE_AFTER;

/// Length of a watch in seconds. Renewals prove contact.
pub(super) const WATCH_SECONDS: u32 = 20;
/// Timeout of a streaming list in seconds. 150,000 pods take two minutes.
pub(super) const LIST_SECONDS: u32 = 300;
/// Timeout of one API server response.
pub(super) const SOURCE_ANSWER: Duration = Duration::from_secs(30);
/// Objects in a list page, as in client-go. Timeouts halve it.
pub(super) const LIST_PAGE: u32 = 500;
/// Minimum objects in a list page: 30 MB in [`SOURCE_ANSWER`].
pub(super) const LIST_PAGE_MIN: u32 = 20;

/// Bookmark annotation at the end of a streaming list.
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";
/// Tolerance for the server's timeout of a watch.
const LATE: Duration = Duration::from_secs(5);
// The margin covers requests between quiet watches.
const _: () = assert!(STALE_AFTER.as_secs() > WATCH_SECONDS as u64 + LATE.as_secs());
/// Length in seconds of the first watch after a failure: above [`EARLY_CLOSE`], and short enough that quiet watches do
/// not become stale.
const RECOVERY_SECONDS: u32 = 3;
/// Duration below which an empty watch counts as failed.
const EARLY_CLOSE: Duration = Duration::from_secs(1);
/// Early closes before a relist. Servers without watch cache do not report compaction.
const EARLY_CLOSES_MAX: usize = 3;
/// Watch errors before a relist. An object that fails decoding fails each watch.
const WATCH_ERRORS_MAX: usize = 3;
/// Quiet watches before the newest version is requested. A server without etcd still serves cached watches.
const QUIET_WATCHES_MAX: usize = 3;
/// Status of a request for a compacted version.
const GONE: u16 = 410;

/// Failure of a list or watch. The next call resumes or relists.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Api(#[from] kube::Error),
    #[error("{}: {}", .0.reason, .0.message)]
    Status(Box<kube::core::Status>),
    #[error("no response within {} s", SOURCE_ANSWER.as_secs())]
    Timeout,
    #[error("streaming list rejected: {0}")]
    NoStreamingList(kube::Error),
    #[error("streaming list ended before it was complete")]
    IncompleteList,
    /// Usual when a server shuts down.
    #[error("watch ended immediately")]
    ClosedEarly,
    /// The server was restored.
    #[error("resource version went back from {current} to {newest}; listing again")]
    ResourceVersionRegressed { current: String, newest: String },
    #[error("response has no resourceVersion")]
    NoResourceVersion,
}

impl Error {
    pub(super) fn code(&self) -> Option<u16> {
        match self {
            Self::Api(kube::Error::Api(status)) | Self::Status(status) => Some(status.code),
            _ => None,
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum InitialListStrategy {
    Streaming,
    Paged,
}

/// Versions advance the watch, except in `InitApply` and in `Delete` during a list.
pub(super) enum Event {
    Init,
    InitApply(RawObject),
    InitDone(String),
    Apply(RawObject),
    Delete(RawObject),
    Bookmark(String),
}

type Events = BoxStream<'static, kube::Result<WatchEvent<RawObject>>>;

enum State {
    Empty,
    InitialWatch(Events),
    InitPage { next: Option<String>, items: std::vec::IntoIter<RawObject>, version: Option<String> },
    InitListed(String),
    Watching(Events, String),
}

pub(super) struct Watcher {
    list_watch: ListWatch,
    strategy: InitialListStrategy,
    state: State,
    /// `None` after the first event.
    watch_opened_at: Option<Instant>,
    early_closes: usize,
    /// Errors within watches since the last event.
    errors: usize,
    quiet_watches: usize,
    page_max: u32,
    /// The server may have been restored to an earlier version.
    verify_resource_version: bool,
}

struct ListWatch {
    api: Api<RawObject>,
    labels: String,
    fields: String,
}

impl Watcher {
    pub(super) fn new(
        api: Api<RawObject>,
        labels: String,
        fields: String,
        strategy: InitialListStrategy,
    ) -> Self {
        Self {
            list_watch: ListWatch { api, labels, fields },
            strategy,
            state: State::Empty,
            watch_opened_at: None,
            early_closes: 0,
            errors: 0,
            quiet_watches: 0,
            page_max: LIST_PAGE,
            verify_resource_version: false,
        }
    }

    /// Returns the next event. Not cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Event, Error> {
        loop {
            let state = std::mem::replace(&mut self.state, State::Empty);
            let (state, event) = match state {
                State::Empty if self.strategy == InitialListStrategy::Streaming => {
                    // No version: the newest, so that restarts do not go back.
                    let events = match self.list_watch.watch(LIST_SECONDS, true, "").await {
                        Err(Error::Api(kube::Error::Api(status))) if matches!(status.code, 400 | 422) => {
                            return Err(Error::NoStreamingList(kube::Error::Api(status)));
                        }
                        events => events?,
                    };
                    (State::InitialWatch(events), Some(Event::Init))
                }
                State::Empty => {
                    let items = Vec::new().into_iter();
                    (State::InitPage { next: None, items, version: None }, Some(Event::Init))
                }
                State::InitialWatch(events) => next_initial_event(events).await?,
                State::InitPage { next, mut items, version } => match (items.next(), next, version) {
                    (Some(item), next, version) => {
                        (State::InitPage { next, items, version }, Some(Event::InitApply(item)))
                    }
                    (None, None, Some(version)) => {
                        (State::InitListed(version.clone()), Some(Event::InitDone(version)))
                    }
                    (None, next, _) => (self.page(next).await?, None),
                },
                State::InitListed(version) => {
                    self.state = State::InitListed(version.clone());
                    let is_unverified = std::mem::replace(&mut self.verify_resource_version, true);
                    if is_unverified || self.quiet_watches >= QUIET_WATCHES_MAX {
                        let newest = self.list_watch.newest().await?;
                        self.quiet_watches = 0;
                        if self::version(&newest) < self::version(&version) {
                            (self.state, self.verify_resource_version) = (State::Empty, false);
                            return Err(Error::ResourceVersionRegressed { current: version, newest });
                        }
                    }
                    let seconds = if is_unverified { RECOVERY_SECONDS } else { WATCH_SECONDS };
                    let events = self.list_watch.watch(seconds, false, &version).await;
                    let events = events.map_err(|error| self.relist_if_needed(error))?;
                    self.verify_resource_version = false;
                    self.watch_opened_at = Some(Instant::now());
                    (State::Watching(events, version), None)
                }
                State::Watching(events, version) => self.next_watch_event(events, version).await?,
            };
            self.state = state;
            if let Some(event) = event {
                return Ok(event);
            }
        }
    }

    async fn next_watch_event(
        &mut self,
        mut events: Events,
        version: String,
    ) -> Result<(State, Option<Event>), Error> {
        // Failures resume from here.
        self.state = State::InitListed(version.clone());
        let deadline = Duration::from_secs(WATCH_SECONDS.into()) + LATE;
        let event = tokio::time::timeout(deadline, events.next()).await;
        let opened_at = self.watch_opened_at.take();
        self.verify_resource_version = matches!(event, Err(_) | Ok(Some(Err(_))));
        let Ok(Some(event)) = event else {
            if opened_at.is_some_and(|opened_at| opened_at.elapsed() < EARLY_CLOSE) {
                (self.verify_resource_version, self.early_closes) = (true, self.early_closes + 1);
                if self.early_closes == EARLY_CLOSES_MAX {
                    (self.state, self.early_closes) = (State::Empty, 0);
                }
                return Err(Error::ClosedEarly);
            }
            self.early_closes = 0;
            self.quiet_watches += 1;
            // A silent connection proves nothing.
            let event = (!self.verify_resource_version).then(|| Event::Bookmark(version.clone()));
            return Ok((State::InitListed(version), event));
        };
        self.early_closes = 0;
        let (event, reached) = match event.map_err(Error::from).and_then(versioned_event) {
            Ok(versioned) => versioned,
            Err(error) => {
                // A broken connection is unrelated to the version.
                self.errors += usize::from(!matches!(error, Error::Api(kube::Error::ReadEvents(_))));
                return Err(self.relist_if_needed(error));
            }
        };
        self.errors = 0;
        if reached != version {
            self.quiet_watches = 0;
        }
        Ok((State::Watching(events, reached), Some(event)))
    }

    /// Timeouts shrink this and later pages.
    async fn page(&mut self, next: Option<String>) -> Result<State, Error> {
        let page = self.list_watch.page(self.page_max, next.clone()).await;
        if matches!(page, Err(Error::Timeout)) {
            self.page_max = (self.page_max / 2).max(LIST_PAGE_MIN);
            self.state = State::InitPage { next, items: Vec::new().into_iter(), version: None };
        }
        page
    }

    fn relist_if_needed(&mut self, error: Error) -> Error {
        if error.code() == Some(GONE) || self.errors >= WATCH_ERRORS_MAX {
            (self.state, self.errors) = (State::Empty, 0);
        }
        error
    }
}

impl ListWatch {
    async fn watch(&self, seconds: u32, send_initial_events: bool, version: &str) -> Result<Events, Error> {
        let params = WatchParams {
            timeout: Some(seconds),
            send_initial_events,
            ..WatchParams::default().labels(&self.labels).fields(&self.fields)
        };
        let events = tokio::time::timeout(SOURCE_ANSWER, self.api.watch(&params, version));
        Ok(events.await.map_err(|_| Error::Timeout)??.boxed())
    }

    /// Selectors might make the server read all objects.
    async fn newest(&self) -> Result<String, Error> {
        self.list(&ListParams::default().limit(1))
            .await?
            .metadata
            .resource_version
            .ok_or(Error::NoResourceVersion)
    }

    async fn list(&self, params: &ListParams) -> Result<ObjectList<RawObject>, Error> {
        let list = tokio::time::timeout(SOURCE_ANSWER, self.api.list(params));
        Ok(list.await.map_err(|_| Error::Timeout)??)
    }

    async fn page(&self, limit: u32, next: Option<String>) -> Result<State, Error> {
        let params = ListParams {
            limit: Some(limit),
            continue_token: next,
            ..ListParams::default().labels(&self.labels).fields(&self.fields)
        };
        let page = self.list(&params).await?;
        let version = page.metadata.resource_version.filter(|version| !version.is_empty());
        let next = page.metadata.continue_.filter(|next| !next.is_empty());
        if version.is_none() && next.is_none() {
            return Err(Error::NoResourceVersion);
        }
        Ok(State::InitPage { next, items: page.items.into_iter(), version })
    }
}

async fn next_initial_event(mut events: Events) -> Result<(State, Option<Event>), Error> {
    let event =
        tokio::time::timeout(SOURCE_ANSWER, events.next()).await.map_err(|_| Error::IncompleteList)?;
    Ok(match event.ok_or(Error::IncompleteList)?? {
        WatchEvent::Added(raw) | WatchEvent::Modified(raw) => {
            (State::InitialWatch(events), Some(Event::InitApply(raw)))
        }
        WatchEvent::Bookmark(mark) if mark.metadata.annotations.contains_key(INITIAL_EVENTS_END) => {
            let version = mark.metadata.resource_version;
            // A new watch can be renewed more often.
            (State::InitListed(version.clone()), Some(Event::InitDone(version)))
        }
        // Concurrent changes may precede the end of the list.
        WatchEvent::Deleted(raw) => (State::InitialWatch(events), Some(Event::Delete(raw))),
        WatchEvent::Bookmark(_) => (State::InitialWatch(events), None),
        WatchEvent::Error(status) => return Err(Error::Status(status)),
    })
}

fn versioned_event(event: WatchEvent<RawObject>) -> Result<(Event, String), Error> {
    let version = |raw: &RawObject| raw.metadata.resource_version.clone().ok_or(Error::NoResourceVersion);
    Ok(match event {
        WatchEvent::Added(raw) | WatchEvent::Modified(raw) => {
            let version = version(&raw)?;
            (Event::Apply(raw), version)
        }
        WatchEvent::Deleted(raw) => {
            let version = version(&raw)?;
            (Event::Delete(raw), version)
        }
        WatchEvent::Bookmark(mark) => {
            let version = mark.metadata.resource_version;
            (Event::Bookmark(version.clone()), version)
        }
        WatchEvent::Error(status) => return Err(Error::Status(status)),
    })
}

/// `None` if not comparable.
pub(super) fn version(text: &str) -> Option<Version> {
    text.parse().ok().map(Version)
}

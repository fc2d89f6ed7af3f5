//! One watch of a resource: a streaming list (KEP-3157) or one by pages, then what changes from there on, renewed
//! before the source may be gone unnoticed. kube's `watcher` does as much, but tells neither how far it is nor that it
//! was heard: without the first no replica can be kept from taking an agent back in time, without the second none knows
//! that it is cut off. An event, a bookmark and the orderly end of a watch prove that the server serves the watch; an
//! accepted watch request proves nothing.

use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::BoxStream;
use kube::Api;
use kube::api::{ListParams, ObjectList, WatchEvent, WatchParams};
use tokio::time::Instant;

use super::Raw;
use crate::config::{LIST_PAGE, LIST_PAGE_MIN, LIST_SECONDS, SOURCE_ANSWER, STALE_AFTER, WATCH_SECONDS};
use crate::model::Version;

/// The annotation of the bookmark that ends a streaming list.
const LISTED: &str = "k8s.io/initial-events-end";
/// What a watch may be late to end that the server ends.
const LATE: Duration = Duration::from_secs(5);
// Without events or bookmarks, a watch proves once in WATCH_SECONDS that the source is there. The rest of STALE_AFTER is
// for the requests in between.
const _: () = assert!(STALE_AFTER.as_secs() > WATCH_SECONDS as u64 + LATE.as_secs());
/// Length of the first watch after a failure, in seconds: more than [`SHORT`], so that its end is an orderly one. With
/// [`WATCH_SECONDS`], every quiet watch of a server that was away for 10 s would become stale.
const RECOVERY_SECONDS: u32 = 3;
/// A watch that brings nothing and ends sooner is one that failed.
const SHORT: Duration = Duration::from_secs(1);
/// So many in a row, and the server may no longer know the version: one without a watch cache does not say so.
const SHORTS_MAX: usize = 3;
/// Errors within watches without an event or a bookmark in between, before all is listed again. An object that the server cannot
/// convert, or whose event does not decode, fails at every watch from before it.
const WATCH_ERRORS_MAX: usize = 3;
/// Watches in a row that end at the version where they began, before the server is asked for its newest version. A
/// server that lost its etcd still serves watches, from a cache that no longer changes; a list of one object a minute
/// detects that.
const QUIET_WATCHES_MAX: usize = 3;
/// The status of an answer that says that what was asked for is no longer known.
const GONE: u16 = 410;

/// What went wrong. Asking on goes on from where the watch was, or lists again where it must.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A list or a watch was refused or broke.
    #[error("{0}")]
    Api(#[from] kube::Error),
    /// The server said so within a watch.
    #[error("{}: {}", .0.reason, .0.message)]
    Status(Box<kube::core::Status>),
    /// No answer at all.
    #[error("no answer within {} s", SOURCE_ANSWER.as_secs())]
    Silent,
    /// A streaming list is refused as such.
    #[error("no streaming list: {0}")]
    NoStreamingList(kube::Error),
    /// A streaming list that ended, or fell silent, before it was complete.
    #[error("the list broke off")]
    Cut,
    /// A watch that ended as soon as it began, as those do of a server that goes away.
    #[error("the watch ended at once")]
    Short,
    /// The server has less than it had: it was restored.
    #[error("the API server is at {newest} and was at {held}: all is listed again")]
    WentBack {
        /// Where the watch is.
        held: String,
        /// Where the server is.
        newest: String,
    },
    /// An object or a list without one.
    #[error("the API server gives no resourceVersion")]
    NoVersion,
}

impl Error {
    /// The status that the server answered with.
    pub(super) fn code(&self) -> Option<u16> {
        match self {
            Self::Api(kube::Error::Api(status)) | Self::Status(status) => Some(status.code),
            _ => None,
        }
    }
}

/// How the first list is had.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum List {
    Streaming,
    Paged,
}

/// What is said. Each but the first two with how far the watch is then, but for what goes during a list.
pub(super) enum Said {
    /// A list begins.
    Begin,
    /// An object is on the list. Its version is not how far the watch is.
    Listed(Raw),
    /// The list is complete.
    End(String),
    Put(Raw),
    Gone(Raw),
    /// Nothing is new.
    Quiet(String),
}

type Events = BoxStream<'static, kube::Result<WatchEvent<Raw>>>;

enum State {
    Start,
    Streaming(Events),
    Paging { next: Option<String>, items: std::vec::IntoIter<Raw>, version: Option<String> },
    Listed(String),
    Following(Events, String),
}

/// See the module's text.
pub(super) struct Watch {
    asked: Asked,
    list: List,
    state: State,
    /// When the watch was opened that has brought nothing yet.
    opened: Option<Instant>,
    /// Watches that ended as soon as they began, in a row.
    shorts: usize,
    /// Errors within watches since the last event or bookmark.
    errors: usize,
    /// Watches that ended at the version where they began, in a row.
    quiet_watches: usize,
    /// Objects that a page of a list is asked for.
    page_max: u32,
    /// The server may have been away, and have come back as it was before: a watch from where it was would wait in silence.
    is_in_doubt: bool,
}

struct Asked {
    api: Api<Raw>,
    labels: String,
    fields: String,
}

impl Watch {
    /// Of the objects that these selectors mean.
    pub(super) fn new(api: Api<Raw>, labels: String, fields: String, list: List) -> Self {
        Self {
            asked: Asked { api, labels, fields },
            list,
            state: State::Start,
            opened: None,
            shorts: 0,
            errors: 0,
            quiet_watches: 0,
            page_max: LIST_PAGE,
            is_in_doubt: false,
        }
    }

    /// What comes next. Not to be dropped half-way.
    pub(super) async fn next(&mut self) -> Result<Said, Error> {
        loop {
            let state = std::mem::replace(&mut self.state, State::Start);
            let (state, said) = match state {
                State::Start if self.list == List::Streaming => {
                    // No version: as new as can be had, so that a hub that restarts does not go back in time.
                    let events = match self.asked.watch(LIST_SECONDS, true, "").await {
                        Err(Error::Api(kube::Error::Api(status))) if matches!(status.code, 400 | 422) => {
                            return Err(Error::NoStreamingList(kube::Error::Api(status)));
                        }
                        events => events?,
                    };
                    (State::Streaming(events), Some(Said::Begin))
                }
                State::Start => {
                    let items = Vec::new().into_iter();
                    (State::Paging { next: None, items, version: None }, Some(Said::Begin))
                }
                State::Streaming(events) => streamed(events).await?,
                State::Paging { next, mut items, version } => match (items.next(), next, version) {
                    (Some(item), next, version) => {
                        (State::Paging { next, items, version }, Some(Said::Listed(item)))
                    }
                    (None, None, Some(version)) => (State::Listed(version.clone()), Some(Said::End(version))),
                    (None, next, _) => (self.page(next).await?, None),
                },
                State::Listed(version) => {
                    // A failure here goes on from the same version.
                    self.state = State::Listed(version.clone());
                    let is_in_doubt = std::mem::replace(&mut self.is_in_doubt, true);
                    if is_in_doubt || self.quiet_watches >= QUIET_WATCHES_MAX {
                        let newest = self.asked.newest().await?;
                        self.quiet_watches = 0;
                        if self::version(&newest) < self::version(&version) {
                            (self.state, self.is_in_doubt) = (State::Start, false);
                            return Err(Error::WentBack { held: version, newest });
                        }
                    }
                    let seconds = if is_in_doubt { RECOVERY_SECONDS } else { WATCH_SECONDS };
                    let events = self.asked.watch(seconds, false, &version).await;
                    let events = events.map_err(|error| self.broken_by(error))?;
                    self.is_in_doubt = false;
                    self.opened = Some(Instant::now());
                    (State::Following(events, version), None)
                }
                State::Following(events, version) => self.follow(events, version).await?,
            };
            self.state = state;
            if let Some(said) = said {
                return Ok(said);
            }
        }
    }

    async fn follow(&mut self, mut events: Events, version: String) -> Result<(State, Option<Said>), Error> {
        // Whatever breaks, the watch goes on from here, unless the server no longer knows the version.
        self.state = State::Listed(version.clone());
        let patience = Duration::from_secs(WATCH_SECONDS.into()) + LATE;
        let event = tokio::time::timeout(patience, events.next()).await;
        let opened = self.opened.take();
        self.is_in_doubt = matches!(event, Err(_) | Ok(Some(Err(_))));
        let Ok(Some(event)) = event else {
            if opened.is_some_and(|opened| opened.elapsed() < SHORT) {
                (self.is_in_doubt, self.shorts) = (true, self.shorts + 1);
                if self.shorts == SHORTS_MAX {
                    (self.state, self.shorts) = (State::Start, 0);
                }
                return Err(Error::Short);
            }
            self.shorts = 0;
            self.quiet_watches += 1;
            // A connection that went silent proves nothing.
            let said = (!self.is_in_doubt).then(|| Said::Quiet(version.clone()));
            return Ok((State::Listed(version), said));
        };
        self.shorts = 0;
        let (said, reached) = match event.map_err(Error::from).and_then(said) {
            Ok(said) => said,
            Err(error) => {
                // A broken connection has nothing to do with the version.
                self.errors += usize::from(!matches!(error, Error::Api(kube::Error::ReadEvents(_))));
                return Err(self.broken_by(error));
            }
        };
        self.errors = 0;
        if reached != version {
            self.quiet_watches = 0;
        }
        Ok((State::Following(events, reached), Some(said)))
    }

    /// Asks for a page of a list. A page that times out is asked for again with half as many objects, and so are those
    /// after it: a list from its start at the same size would time out at the same page.
    async fn page(&mut self, next: Option<String>) -> Result<State, Error> {
        let page = self.asked.page(self.page_max, next.clone()).await;
        if matches!(page, Err(Error::Silent)) {
            self.page_max = (self.page_max / 2).max(LIST_PAGE_MIN);
            self.state = State::Paging { next, items: Vec::new().into_iter(), version: None };
        }
        page
    }

    /// Where the server no longer knows the version, or fails at it again and again, all is listed again.
    fn broken_by(&mut self, error: Error) -> Error {
        if error.code() == Some(GONE) || self.errors >= WATCH_ERRORS_MAX {
            (self.state, self.errors) = (State::Start, 0);
        }
        error
    }
}

impl Asked {
    async fn watch(&self, seconds: u32, lists: bool, version: &str) -> Result<Events, Error> {
        let params = WatchParams {
            timeout: Some(seconds),
            send_initial_events: lists,
            ..WatchParams::default().labels(&self.labels).fields(&self.fields)
        };
        let events = tokio::time::timeout(SOURCE_ANSWER, self.api.watch(&params, version));
        Ok(events.await.map_err(|_| Error::Silent)??.boxed())
    }

    /// How far the server is now. Without the selectors: with them, a server may read all objects to find one.
    async fn newest(&self) -> Result<String, Error> {
        self.list(&ListParams::default().limit(1)).await?.metadata.resource_version.ok_or(Error::NoVersion)
    }

    async fn list(&self, params: &ListParams) -> Result<ObjectList<Raw>, Error> {
        let list = tokio::time::timeout(SOURCE_ANSWER, self.api.list(params));
        Ok(list.await.map_err(|_| Error::Silent)??)
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
            return Err(Error::NoVersion);
        }
        Ok(State::Paging { next, items: page.items.into_iter(), version })
    }
}

async fn streamed(mut events: Events) -> Result<(State, Option<Said>), Error> {
    let event = tokio::time::timeout(SOURCE_ANSWER, events.next()).await.map_err(|_| Error::Cut)?;
    Ok(match event.ok_or(Error::Cut)?? {
        WatchEvent::Added(raw) | WatchEvent::Modified(raw) => {
            (State::Streaming(events), Some(Said::Listed(raw)))
        }
        WatchEvent::Bookmark(mark) if mark.metadata.annotations.contains_key(LISTED) => {
            let version = mark.metadata.resource_version;
            // The watch that follows is renewed more often.
            (State::Listed(version.clone()), Some(Said::End(version)))
        }
        // What happens meanwhile comes too, where the end of the list is late.
        WatchEvent::Deleted(raw) => (State::Streaming(events), Some(Said::Gone(raw))),
        WatchEvent::Bookmark(_) => (State::Streaming(events), None),
        WatchEvent::Error(status) => return Err(Error::Status(status)),
    })
}

/// What an event of a watch says, and how far the watch is then.
fn said(event: WatchEvent<Raw>) -> Result<(Said, String), Error> {
    let version_of = |raw: &Raw| raw.metadata.resource_version.clone().ok_or(Error::NoVersion);
    Ok(match event {
        WatchEvent::Added(raw) | WatchEvent::Modified(raw) => {
            let version = version_of(&raw)?;
            (Said::Put(raw), version)
        }
        WatchEvent::Deleted(raw) => {
            let version = version_of(&raw)?;
            (Said::Gone(raw), version)
        }
        WatchEvent::Bookmark(mark) => {
            let version = mark.metadata.resource_version;
            (Said::Quiet(version.clone()), version)
        }
        WatchEvent::Error(status) => return Err(Error::Status(status)),
    })
}

/// A version as it can be compared, where it can be.
pub(super) fn version(text: &str) -> Option<Version> {
    text.parse().ok().map(Version)
}

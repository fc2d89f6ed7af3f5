//! Keeps one OPA in step, session after session.
//!
//! ```text
//!                    ┌─ no marker ──────────▶ load ──────┐
//!  ask OPA what it   ├─ half done, or not ──▶ reconcile ─┤
//!  holds (marker) ───┤  believed                         ├─▶ stream ─▶ follow: events, and looks at OPA
//!    ▲               └─ whole ───────────────────────────┘    │ 410: reconcile once
//!    │                                                        │
//!    └──── pause ◀── no hub, no OPA, another marker, a frame that does not fit ◀──────┘
//! ```
//!
//! Every way out of a session leads to asking OPA what it holds: there is one path for the start and for a restart of
//! OPA, of the agent or of the hub.

use std::collections::BTreeMap;
use std::time::Duration;

use opa_hub_proto::frame::{DELTA_EVENT, Delta, POLICY_EVENT, Policy};
use opa_hub_proto::position::{Judge, Lag, Position};
use opa_hub_proto::reconcile::Reconcile;
use opa_hub_proto::revision::{Digest, Revision, modules_digest};
use opa_hub_proto::sse::{Message, Word};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, timeout};

use crate::apply::{self, Applier, Modules};
use crate::archive;
use crate::config::{
    ACTIVATION_MAX, Delivery, FRESH_LOOK, FRESH_LOOK_MAX, HUB_FIRST, LAG_MAX, OPA_POLL, REFUSALS_MAX,
    RETRY_FIRST, RETRY_MAX, UNACTIVATED_PAUSE, WAIT_MAX,
};
use crate::layout::Layout;
use crate::local::Local;
use crate::marker::Marker;
use crate::opa::Opa;
use crate::pull::{self, Archive, Hubs, PolicyBundle, Stream};
use crate::state::{Meta, State};
use crate::status::Status;
use crate::{config, opa};

/// See the module's text.
pub struct Replica {
    applier: Applier,
    hubs: Hubs,
    delivery: Delivery,
    local: Local,
    status: Status,
    /// OPA refused data: a package that goes may lie where it comes.
    modules_first: bool,
    trust: Trust,
    /// When hubs first and last said that they are behind what OPA holds.
    lags: Option<(Instant, Instant)>,
    /// When a hub that hears its source is looked for, and how long after that again.
    look: (Instant, Duration),
    /// Last good state on disk.
    state: Option<State>,
    /// Revision of its last commit.
    saved: Option<Revision>,
    /// Policy bundle of the state that OPA begins with.
    restored: Option<PolicyBundle>,
    /// Packages that OPA was given by REST.
    layout: Layout,
    /// What OPA shows of this session until it restarts.
    shown: Shown,
    /// Whether OPA does not activate the policies that frames lead to: data comes by reconcile until it does.
    is_held_back: bool,
    /// Reconcile requests in a row that hubs refused for good.
    refusals: u32,
}

/// What OPA shows until it restarts.
#[derive(Clone, Copy)]
enum Shown {
    /// Nothing yet, or a marker at some time: a restart takes nothing away before.
    Nothing,
    /// A marker.
    Marker,
    /// The marker of this revision, for which it may have its policies.
    Revision(Revision),
}

impl Shown {
    fn of(marker: &Marker) -> Self {
        marker.revision.map_or(Self::Marker, Self::Revision)
    }
}

/// Looks at OPA while something else is waited for.
struct Look<'a> {
    opa: Opa,
    bundle: String,
    local: &'a Local,
    shown: Shown,
}

impl<'a> Look<'a> {
    fn new(applier: &Applier, local: &'a Local, shown: Shown) -> Self {
        Self { opa: applier.opa.clone(), bundle: applier.bundle.clone(), local, shown }
    }

    /// The result of `wait`, unless OPA restarts before: then OPA needs its last good state at once, whatever hubs do.
    async fn during<T>(&self, wait: impl Future<Output = T>) -> Result<T, Trouble> {
        tokio::select! {
            biased;
            result = wait => Ok(result),
            trouble = self.restart() => Err(trouble),
        }
    }

    /// Waits for a restart of OPA. Lets OPA have its policies as long as it holds the data for them.
    async fn restart(&self) -> Trouble {
        let Self { opa, bundle, .. } = self;
        let mut shown = self.shown;
        let is_whole = matches!(shown, Shown::Revision(_));
        let mut poll = tokio::time::interval_at(Instant::now() + OPA_POLL, OPA_POLL);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                // An OPA that restarted asks for policies at once.
                () = self.local.needs_data(), if is_whole => {}
                _ = poll.tick() => {}
            }
            let polls = self.local.polls();
            let seen = match shown {
                Shown::Nothing | Shown::Marker => opa.has_marker(bundle).await,
                Shown::Revision(revision) => opa.holds(bundle, Some(revision)).await,
            };
            match seen {
                Ok(true) if is_whole => self.local.pass(polls),
                Ok(true) => shown = Shown::Marker,
                Ok(false) if matches!(shown, Shown::Nothing) => {}
                Ok(false) => return apply::Error::OtherWriter.into(),
                Err(opa::Error::Unreachable(error)) if error.is_connect() => {
                    return opa::Error::Unreachable(error).into();
                }
                // A busy OPA answers late. This wait is not for it.
                Err(_) => _ = poll.tick().await,
            }
        }
    }
}

/// What ends a session.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    /// The hub gave nothing.
    #[error(transparent)]
    Hub(#[from] pull::Error),
    /// OPA, or what was to be applied to it.
    #[error(transparent)]
    Apply(#[from] apply::Error),
    /// Older policies would miss what goes.
    #[error("OPA has not activated its policies yet: fields that older ones read stay until then")]
    NotActivated,
}

impl From<opa::Error> for Trouble {
    fn from(error: opa::Error) -> Self {
        Self::Apply(error.into())
    }
}

/// How much of OPA's marker is believed, until OPA was repaired by what is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trust {
    /// All of it.
    Whole,
    /// Its digests, not the revision: what came from the hub did not fit to it.
    Digests,
    /// Only what it names: OPA lacked something that it should hold, so it may lack anything.
    Names,
}

impl Trust {
    fn apply(self, marker: &mut Marker) {
        if self != Self::Whole {
            marker.revision = None;
        }
        if self == Self::Names {
            marker.dirs.values_mut().for_each(|digest| *digest = None);
            marker.modules.values_mut().for_each(|digest| *digest = None);
        }
    }
}

/// What OPA holds and what the hub said.
struct Held {
    marker: Marker,
    /// The modules' digest that the hub said: the marker has another one while OPA refuses some.
    modules: Digest,
    /// What OPA refuses: texts to put, none: ids to remove.
    refused: BTreeMap<String, Option<String>>,
}

impl Held {
    fn revision(&self) -> Revision {
        Revision { modules: self.modules, data: self.marker.data_digest() }
    }
}

impl Replica {
    /// A replica that does nothing yet.
    pub fn new(config: &config::Config, local: Local, status: Status) -> anyhow::Result<Self> {
        let opa = opa::Opa::new(config.opa.clone())?;
        Ok(Self {
            applier: Applier::new(opa, config.bundle.clone()),
            hubs: Hubs::new(
                config.hubs.clone(),
                config.hub_ca_file.as_deref(),
                config.bundle.clone(),
                config.namespace.clone(),
            )?,
            delivery: config.delivery,
            local,
            status,
            modules_first: false,
            trust: Trust::Whole,
            lags: None,
            look: (Instant::now(), FRESH_LOOK),
            state: match &config.state_dir {
                Some(dir) => {
                    let opened = State::open(dir.clone(), &config.bundle, config.namespace.as_deref());
                    // No disk stops an OPA.
                    opened.inspect_err(|error| tracing::error!(%error, "no last good state is kept")).ok()
                }
                None => None,
            },
            saved: None,
            restored: None,
            layout: Layout::default(),
            shown: Shown::Nothing,
            is_held_back: false,
            refusals: 0,
        })
    }

    /// Keeps OPA in step until `stop`, and syncs the last good state.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        tokio::select! {
            () = self.keep() => unreachable!("it runs for ever"),
            () = stop => {}
        }
        if let Some(state) = self.state {
            state.close().await;
        }
    }

    async fn keep(&mut self) {
        let mut opa_pause = RETRY_FIRST;
        loop {
            let started = Instant::now();
            let Err(trouble) = self.session().await;
            self.status.with(|state| {
                state.unconnected.get_or_insert_with(Instant::now);
                state.failure = Some(trouble.to_string());
            });
            match trouble {
                Trouble::Apply(error @ apply::Error::OtherWriter) => {
                    tracing::warn!("{error}");
                    self.status.with(|state| state.held = None);
                    // Another writer's marker stays.
                    self.shown = Shown::Marker;
                    if started.elapsed() < SESSION_MIN {
                        self.pause().await;
                    }
                }
                Trouble::NotActivated => {
                    tracing::warn!("{trouble}");
                    self.is_held_back = true;
                    let activated = async {
                        match self.served_modules() {
                            Some(modules) => self.local.activated(modules).await,
                            None => std::future::pending().await,
                        }
                    };
                    let pause = UNACTIVATED_PAUSE.mul_f64(0.5 + fastrand::f64() / 2.0);
                    // The next session says why it ended.
                    _ = self.look().during(timeout(pause, activated)).await;
                }
                Trouble::Hub(error @ pull::Error::Stale(_)) => {
                    tracing::warn!(to = %self.hubs.current(), %error, "moving");
                }
                Trouble::Hub(pull::Error::Stops(ready)) => {
                    let hub = self.hubs.current().to_string();
                    self.hubs.move_to(ready);
                    tracing::info!(hub, to = %self.hubs.current(), "the hub stops");
                    if started.elapsed() < SESSION_MIN {
                        self.pause().await;
                    }
                }
                Trouble::Hub(error) => {
                    if let pull::Error::Lags(_) = error {
                        let now = Instant::now();
                        let held = self.lags.filter(|(_, last)| now - *last < self.hubs.turn());
                        self.lags = Some((held.map_or(now, |(first, _)| first), now));
                    }
                    tracing::warn!(hub = %self.hubs.current(), %error, "no stream");
                    self.hubs.move_on();
                    self.pause().await;
                }
                Trouble::Apply(apply::Error::Opa(opa::Error::Unreachable(error))) => {
                    tracing::warn!(%error, "waiting for OPA");
                    // One that only is slow still has what it had.
                    let is_gone = error.is_connect();
                    if is_gone {
                        self.local.lost();
                    } else {
                        self.status.with(|state| state.held = None);
                    }
                    tokio::time::sleep(opa_pause.mul_f64(fastrand::f64())).await;
                    opa_pause = (opa_pause * 2).min(OPA_RETRY_MAX);
                    continue;
                }
                Trouble::Apply(error) => {
                    tracing::warn!(%error, "repairing");
                    self.status.with(|state| state.held = None);
                    // Modules in the place of data must come before it, data in the place of modules behind them.
                    let is_verdict = matches!(&error, apply::Error::Opa(error) if error.is_verdict());
                    self.modules_first = is_verdict && !self.modules_first;
                    self.trust = match error {
                        apply::Error::Opa(opa::Error::Missing(_)) => Trust::Names,
                        _ => Trust::Digests,
                    };
                    // What was applied may have taken the revision from the marker.
                    self.shown = Shown::Nothing;
                    self.hubs.move_on();
                    self.pause().await;
                }
            }
            opa_pause = RETRY_FIRST;
        }
    }

    fn look(&self) -> Look<'_> {
        Look::new(&self.applier, &self.local, self.shown)
    }

    /// Waits before the next try, at most until OPA restarts.
    async fn pause(&mut self) {
        let look = Look::new(&self.applier, &self.local, self.shown);
        // The next session says why it ended.
        _ = look.during(self.hubs.pause()).await;
    }

    /// From asking OPA what it holds to whatever ends that.
    async fn session(&mut self) -> Result<std::convert::Infallible, Trouble> {
        self.shown = Shown::Nothing;
        let mut found = self.applier.claim().await?;
        if found.is_none() {
            self.local.lost();
        } else {
            self.shown = Shown::Marker;
        }
        if let Some(marker) = &mut found {
            self.trust.apply(marker);
            if self.lags.is_some_and(|(first, last)| last - first > LAG_MAX) {
                tracing::warn!(
                    "no hub is as new as what OPA holds: the source went back, and OPA goes with it"
                );
                marker.position = Position::default();
            }
        }
        let whole = found.as_ref().filter(|marker| self.believed(marker).is_some());
        self.status.with(|state| {
            state.held = whole.and_then(|marker| marker.revision);
            // An agent that restarted knows what the hub said from OPA.
            state.said = state.said.or(state.held);
        });
        let is_whole = whole.is_some();
        if let Some(marker) = &mut found {
            let before = marker.clone();
            self.compare_with_state(marker).await;
            if let Some(modules) = self.believed(&before) {
                // Without a hub too.
                self.local.serve(self.known_bundle(modules));
                self.shown = Shown::of(&before);
                self.check_held(before.revision).await?;
            }
        }
        if self.modules_first && self.delivery == Delivery::Bundle {
            let policy = self.look().during(self.hubs.policy_bundle()).await??;
            self.local.serve(Some(policy));
        }
        let resumable = match &found {
            // No frames lead on while OPA has not activated the policies for them.
            Some(marker) if !self.is_held_back => self.resumable(marker).await?,
            _ => None,
        };
        let mut held = match (found, resumable) {
            (Some(marker), Some(modules)) => {
                // It has these; what leads on may be refused again.
                self.status.with(|state| state.refused.clear());
                Held { marker, modules, refused: BTreeMap::new() }
            }
            (found, _) => {
                let held = match found {
                    None => self.load().await?,
                    Some(marker) => match self.reconcile(marker.clone()).await {
                        // A load that broke off, and no hub to go on with.
                        Err(error @ (Trouble::Hub(_) | Trouble::Apply(apply::Error::Archive(_))))
                            if !is_whole =>
                        {
                            match self.last_good().await {
                                Some(meta) => self.restore(Some(&marker), meta).await?,
                                None => return Err(error),
                            }
                        }
                        other => other?,
                    },
                };
                self.check_held(held.marker.revision).await?;
                held
            }
        };
        self.trust = Trust::Whole;
        self.restored = None;
        let mut stream = self.stream(&held).await?;
        for _ in 0..RECONCILES_MAX {
            if stream.is_none() && !self.is_held_back {
                held = self.reconcile(held.marker).await?;
                stream = self.stream(&held).await?;
            }
        }
        self.is_held_back = false;
        let Some(stream) = stream else {
            // Data that older policies read too is no revision of a hub.
            let is_wider = self.delivery == Delivery::Bundle && held.marker.reads.len() > 1;
            // Else a hub does not know what it gave us a moment ago: after a pause, another.
            return Err(if is_wider { Trouble::NotActivated } else { pull::Error::Closed.into() });
        };
        self.modules_first = false;
        if self.delivery == Delivery::Rest {
            self.layout.read(&self.applier.opa, &held.marker).await;
            self.note_layout(&held.marker);
        }
        tracing::info!(hub = %self.hubs.current(), revision = %held.revision(), "following");
        self.status.with(|state| (state.unconnected, state.failure) = (None, None));
        self.follow(stream, held).await
    }

    /// The stream from what OPA holds on; `None` if the hub does not know that.
    async fn stream(&self, held: &Held) -> Result<Option<Stream>, Trouble> {
        Ok(self.look().during(self.hubs.stream(held.revision(), &held.marker.position)).await??)
    }

    /// Leaves of `marker` what the state has too, where they differ: after a crash, or in a directory that is new.
    async fn compare_with_state(&mut self, marker: &mut Marker) {
        let Some(state) = &mut self.state else { return };
        state.abort().await;
        if self.saved.is_none() || self.saved != marker.revision {
            let mut content = state.content().await;
            self.restored = content.bundle.take();
            self.saved = content.meta.as_ref().map(|meta| meta.revision);
            if self.saved.is_none() || self.saved != marker.revision {
                content.intersect(marker);
            }
        }
    }

    /// Makes what OPA holds now the last good state.
    async fn save(&mut self, held: &Held) {
        let Some(state) = &mut self.state else { return };
        let meta = Meta {
            revision: held.revision(),
            position: held.marker.position.clone(),
            ensure: held.marker.ensure.clone(),
            rego_version: held.marker.rego_version,
            reads: held.marker.reads.last().cloned(),
            etag: (self.delivery == Delivery::Bundle).then(|| held.modules.to_string()),
        };
        self.saved = Some(meta.revision);
        state.commit(meta).await;
    }

    /// What the hub says was taken, or that there is no more. Opening a stream proves nothing: its first frame may be older
    /// than what OPA holds.
    fn accepted(&mut self) {
        self.status.with(|state| state.behind = None);
        self.hubs.settle();
        self.lags = None;
    }

    async fn follow(
        &mut self,
        mut stream: Stream,
        mut held: Held,
    ) -> Result<std::convert::Infallible, Trouble> {
        let mut judge = Judge::new(held.marker.position.clone());
        // Time of the first announcement of an event that has not come.
        let mut announced = None;
        let mut poll = tokio::time::interval(OPA_POLL);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                // An OPA that restarted asks for policies at once.
                () = self.local.needs_data() => self.check_held(held.marker.revision).await?,
                _ = poll.tick() => {
                    self.check_held(held.marker.revision).await?;
                    self.applier.verify(&held.marker).await?;
                }
                message = stream.next() => {
                    match message? {
                        Message::Event { id, event, data } => {
                            announced = None;
                            // What is said is not held until OPA took it.
                            let said = id.parse().ok();
                            self.status.with(|state| state.said = said);
                            self.apply(&mut held, &mut judge, &event, &data, said).await?;
                            self.accepted();
                            stream.heard_now();
                            // Data and policies of one change come together: half of it is not in step.
                            if stream.is_drained() {
                                self.note(&held);
                            }
                        }
                        Message::Comment(words) => {
                            match Word::of(&words) {
                                Word::Go(urls) => {
                                    let ready = urls.into_iter().filter_map(|url| url.parse().ok()).collect();
                                    return Err(pull::Error::Stops(ready).into());
                                }
                                Word::Wait => {
                                    self.status.with(|state| _ = state.behind.get_or_insert_with(Instant::now));
                                    let since = *announced.get_or_insert_with(Instant::now);
                                    if since.elapsed() > WAIT_MAX {
                                        return Err(pull::Error::Waits(WAIT_MAX).into());
                                    }
                                    stream.heard_now();
                                    continue;
                                }
                                Word::Here | Word::Stale(_) => announced = None,
                            }
                            // This was all, so far, and these policies are not what OPA is offered.
                            if !self.is_offered(held.modules) {
                                return Err(pull::Error::Moved.into());
                            }
                            self.accepted();
                            self.note(&held);
                            self.note_freshness(&words).await?;
                            stream.heard_now();
                        }
                    }
                }
            }
        }
    }

    /// Lets OPA have its policies, where it holds the data for them.
    async fn check_held(&self, held: Option<Revision>) -> Result<(), Trouble> {
        let polls = self.local.polls();
        if !self.applier.opa.holds(&self.applier.bundle, held).await? {
            return Err(apply::Error::OtherWriter.into());
        }
        self.local.pass(polls);
        Ok(())
    }

    /// A hub that has not heard its source for a while says so. Whoever hears it is better; where there is nobody, what
    /// it says is the best there is.
    async fn note_freshness(&mut self, words: &str) -> Result<(), Trouble> {
        let Word::Stale(words) = Word::of(words) else {
            self.status.with(|state| state.stale = None);
            self.look = (Instant::now(), FRESH_LOOK);
            return Ok(());
        };
        let words = words.to_owned();
        let now = Instant::now();
        self.status.with(|state| {
            let since = state.stale.take().map_or(now, |(since, _)| since);
            state.stale = Some((since, words.clone()));
        });
        let (at, pause) = self.look;
        if now < at {
            return Ok(());
        }
        self.look = (now + pause.mul_f64(0.5 + fastrand::f64()), (pause * 2).min(FRESH_LOOK_MAX));
        let look = Look::new(&self.applier, &self.local, self.shown);
        let is_moved = look.during(self.hubs.move_to_fresh()).await?;
        if is_moved { Err(pull::Error::Stale(words).into()) } else { Ok(()) }
    }

    /// Applies an event that leads to `said`: half of that is what is held.
    async fn apply(
        &mut self,
        held: &mut Held,
        judge: &mut Judge,
        event: &str,
        data: &[u8],
        said: Option<Revision>,
    ) -> Result<(), Trouble> {
        let half = |from: Option<Digest>, held: Digest| match from {
            Some(from) if from != held => Err(apply::Error::NotHeld { from, held }),
            _ => Ok(()),
        };
        match event {
            DELTA_EVENT => {
                half(said.map(|said| said.modules), held.modules)?;
                let delta: Delta = serde_json::from_slice(data).map_err(apply::Error::from)?;
                judge.pass(&delta.position, delta.dirs.keys(), false).map_err(|lag| lags(&lag))?;
                if delta.narrows && self.delivery == Delivery::Bundle {
                    let activated = timeout(ACTIVATION_MAX, self.local.activated(held.modules));
                    self.look().during(activated).await?.map_err(|_| Trouble::NotActivated)?;
                }
                self.applier.delta(&mut held.marker, &delta).await?;
                if let Some(state) = &mut self.state {
                    state.delta(&delta).await;
                }
            }
            POLICY_EVENT => {
                half(said.map(|said| said.data), held.revision().data)?;
                let policy: Policy = serde_json::from_slice(data).map_err(apply::Error::from)?;
                if policy.from != held.modules {
                    return Err(apply::Error::NotHeld { from: policy.from, held: held.modules }.into());
                }
                judge.pass(&policy.position, std::iter::empty(), true).map_err(|lag| lags(&lag))?;
                held.marker.position = policy.after(&held.marker.position);
                match self.delivery {
                    Delivery::Rest => {
                        held.modules = policy.to;
                        if let Some(state) = &mut self.state {
                            let put = policy.put.iter().map(|(id, text)| (id.clone(), Some(text.clone())));
                            let removed = policy.remove.iter().map(|id| (id.clone(), None));
                            state.modules(put.chain(removed).collect()).await;
                        }
                        let mut changes = std::mem::take(&mut held.refused);
                        changes.extend(policy.put.into_iter().map(|(id, text)| (id, Some(text))));
                        changes.extend(policy.remove.into_iter().map(|id| (id, None)));
                        self.change_modules(held, changes, policy.reads).await?;
                    }
                    Delivery::Bundle => {
                        self.forget_replaced(&mut held.marker);
                        self.offer(held, policy.to, policy.reads).await?;
                    }
                }
            }
            // A hub newer than this agent may say more.
            _ => return Ok(()),
        }
        self.shown = Shown::of(&held.marker);
        self.save(held).await;
        self.status.with(|state| state.done.frames += 1);
        Ok(())
    }

    /// Loads an OPA that has no marker: from the hub, or, where that does not answer soon, from the last good state.
    async fn load(&mut self) -> Result<Held, Trouble> {
        let started = Instant::now();
        let last_good = self.last_good().await;
        let archive = match last_good {
            None => self.all().await?,
            Some(meta) => match timeout(HUB_FIRST, self.all()).await {
                Ok(Ok(archive)) => archive,
                _ => return self.restore(None, meta).await,
            },
        };
        let held = self.take_archive(None, archive).await?;
        self.status.with(|state| state.done.snapshots += 1);
        tracing::info!(revision = %held.revision(), took = ?started.elapsed(), "loaded OPA");
        Ok(held)
    }

    /// All that the hub has for this OPA by REST.
    async fn all(&self) -> Result<Archive, pull::Error> {
        match self.delivery {
            Delivery::Rest => self.hubs.whole().await,
            Delivery::Bundle => self.hubs.data().await,
        }
    }

    /// The last good state, where there is one that was written with this delivery.
    async fn last_good(&mut self) -> Option<Meta> {
        let state = self.state.as_mut()?;
        state.abort().await;
        let content = state.content().await;
        self.restored = content.bundle;
        content.meta.filter(|meta| meta.etag.is_some() == (self.delivery == Delivery::Bundle))
    }

    /// Loads an OPA, which may hold a part of something else, from the last good state.
    async fn restore(&mut self, marker: Option<&Marker>, meta: Meta) -> Result<Held, Trouble> {
        let started = Instant::now();
        let Some(state) = &mut self.state else { return Err(apply::Error::NoHead.into()) };
        let mut pieces = state.read().await;
        let (marker, found) =
            self.applier.archive(marker, self.modules_first, meta.position, &mut pieces).await?;
        self.shown = Shown::Marker;
        let held = self.take_policies(marker, found).await?;
        self.saved = Some(held.revision());
        self.status.with(|state| state.done.restores += 1);
        self.note(&held);
        tracing::warn!(revision = %held.revision(), took = ?started.elapsed(), "no hub answers: loaded OPA from disk");
        Ok(held)
    }

    /// Gives OPA what the digests in its marker say that it lacks.
    async fn reconcile(&mut self, mut marker: Marker) -> Result<Held, Trouble> {
        let started = Instant::now();
        self.status.with(|state| state.held = None);
        let modules = match self.delivery {
            _ if self.refusals >= REFUSALS_MAX => return self.replace(marker).await,
            Delivery::Rest => Some(marker.modules().map(|(id, digest)| (id.to_owned(), digest)).collect()),
            Delivery::Bundle => {
                if let (Some(offered), true) = (marker.revision, marker.reads.len() > 1)
                    && !self.is_held_back
                {
                    // A moment's patience saves an answer that holds what older policies read.
                    let activated = timeout(ACTIVATION_MAX, self.local.activated(offered.modules));
                    _ = self.look().during(activated).await?;
                }
                self.forget_replaced(&mut marker);
                None
            }
        };
        let dirs = marker.dirs().map(|(dir, digest)| (dir.clone(), digest)).collect();
        let request = Reconcile { dirs, modules, reads: marker.reads.clone() };
        let asked = self.hubs.reconcile(&request, marker.revision, &marker.position);
        let answer = self.look().during(asked).await?;
        let archive = match answer {
            Err(error) if error.is_final() => {
                self.refusals += 1;
                return Err(error.into());
            }
            other => other?,
        };
        self.refusals = 0;
        let held = self.take_archive(Some(&marker), archive).await?;
        self.status.with(|state| state.done.reconciles += 1);
        tracing::info!(revision = %held.revision(), took = ?started.elapsed(), "reconciled OPA");
        Ok(held)
    }

    /// Gives OPA all that there is, where hubs take no digests from this agent. What the marker names and is gone is
    /// removed. Until OPA has activated the newest policies, older ones may lack what only they read. An archive that is
    /// behind in anything is refused: the hub renews its watches, and is no longer behind after that.
    async fn replace(&mut self, mut marker: Marker) -> Result<Held, Trouble> {
        tracing::warn!("reconcile refused, loading OPA again");
        Trust::Names.apply(&mut marker);
        let archive = self.look().during(self.all()).await??;
        if archive.position.is_behind(&marker.position) {
            return Err(pull::Error::Lags(format!(
                "{} was heard, {} is held",
                archive.position, marker.position
            ))
            .into());
        }
        self.refusals = 0;
        let held = self.take_archive(Some(&marker), archive).await?;
        self.status.with(|state| state.done.snapshots += 1);
        Ok(held)
    }

    /// Data first, then the policies that may read it.
    async fn take_archive(&mut self, marker: Option<&Marker>, archive: Archive) -> Result<Held, Trouble> {
        let Archive { chunks, position, download } = archive;
        let mut pieces = archive::read(chunks).map_err(apply::Error::from)?;
        // An OPA without a marker gets one with the first piece.
        self.shown = if marker.is_some() { Shown::Marker } else { Shown::Nothing };
        let look = Look::new(&self.applier, &self.local, self.shown);
        let (applier, modules_first) = (&mut self.applier, self.modules_first);
        let (marker, found) = match &mut self.state {
            None => {
                let apply = applier.archive(marker, modules_first, position, &mut pieces);
                look.during(Box::pin(apply)).await??
            }
            Some(state) => {
                let (out, mut copy) = mpsc::channel(1);
                let keep = async {
                    loop {
                        let piece = tokio::select! {
                            piece = pieces.recv() => piece,
                            // OPA failed: the rest is of no use.
                            () = out.closed() => break,
                        };
                        let Some(piece) = piece else { break };
                        if let Ok(piece) = &piece {
                            state.piece(piece).await;
                        }
                        if out.send(piece).await.is_err() {
                            break;
                        }
                    }
                    drop(out);
                };
                let apply = async move { applier.archive(marker, modules_first, position, &mut copy).await };
                let both = Box::pin(async { tokio::join!(keep, apply) });
                let ((), applied) = look.during(both).await?;
                applied?
            }
        };
        drop(download);
        self.shown = Shown::Marker;
        let held = self.take_policies(marker, found).await?;
        self.save(&held).await;
        Ok(held)
    }

    /// The policies that OPA's data is for.
    async fn take_policies(&mut self, marker: Marker, found: Modules) -> Result<Held, Trouble> {
        let mut held = Held { marker, modules: modules_digest([], None), refused: BTreeMap::new() };
        match self.delivery {
            Delivery::Rest => self.take_modules(&mut held, found).await?,
            Delivery::Bundle => {
                let modules = found.digest.ok_or(apply::Error::NoHead)?;
                self.offer(&mut held, modules, found.reads).await?;
            }
        }
        self.shown = Shown::of(&held.marker);
        Ok(held)
    }

    async fn take_modules(&mut self, held: &mut Held, found: Modules) -> Result<(), Trouble> {
        let all = found.all.as_ref().ok_or(apply::Error::NoHead)?;
        held.modules =
            modules_digest(all.iter().map(|(id, digest)| (id.as_str(), *digest)), held.marker.rego_version);
        let changes = found.changes(Some(&held.marker));
        self.change_modules(held, changes, found.reads).await
    }

    /// Puts (`Some`) and removes (`None`) modules, and remembers what OPA refuses.
    async fn change_modules(
        &mut self,
        held: &mut Held,
        changes: BTreeMap<String, Option<String>>,
        reads: Option<String>,
    ) -> Result<(), Trouble> {
        let refused = self.applier.modules(&mut held.marker, &changes, reads).await?;
        for (id, text) in &changes {
            self.layout.record(id, text.as_deref());
        }
        self.note_layout(&held.marker);
        held.refused = changes.into_iter().filter(|(id, _)| refused.contains_key(id)).collect();
        self.status.with(|state| state.refused = refused);
        Ok(())
    }

    /// Offers OPA the policy bundle of these modules, which read `reads`. The hub may have newer ones by now: those may
    /// read what is not here yet.
    async fn offer(
        &mut self,
        held: &mut Held,
        modules: Digest,
        reads: Option<String>,
    ) -> Result<(), Trouble> {
        let policy = self.policy_bundle(modules).await?.ok_or(pull::Error::Moved)?;
        held.marker.may_read(reads);
        held.modules = modules;
        held.marker.revision = Some(held.revision());
        self.applier.mark(&held.marker).await?;
        if let Some(state) = &mut self.state {
            state.bundle(policy.clone()).await;
        }
        self.local.serve(Some(policy));
        Ok(())
    }

    /// The policy bundle of these modules, if the hub still has it.
    async fn policy_bundle(&self, modules: Digest) -> Result<Option<PolicyBundle>, Trouble> {
        if let Some(known) = self.known_bundle(modules) {
            return Ok(Some(known));
        }
        let newest = self.look().during(self.hubs.policy_bundle()).await??;
        Ok(Some(newest).filter(|policy| policy.etag == modules.to_string()))
    }

    /// The policy bundle of these modules, if it is here.
    fn known_bundle(&self, modules: Digest) -> Option<PolicyBundle> {
        let known = self.local.served().into_iter().chain(self.restored.clone());
        known.into_iter().find(|policy| policy.etag == modules.to_string())
    }

    /// Whether OPA has these modules, or can have them from here.
    fn is_offered(&self, modules: Digest) -> bool {
        let served = || self.local.served().is_some_and(|served| served.etag == modules.to_string());
        self.delivery == Delivery::Rest || served()
    }

    /// The modules of the policy bundle that OPA is offered.
    fn served_modules(&self) -> Option<Digest> {
        self.local.served()?.etag.parse().ok()
    }

    /// Once OPA activated what it is offered, what came before decides no more.
    fn forget_replaced(&self, marker: &mut Marker) {
        let served = self.served_modules();
        if served.is_some() && self.status.with(|state| state.activated) == served {
            marker.only_newest();
        }
    }

    /// The modules' digest that a stream may resume from, when the marker tells of a whole revision.
    fn believed(&self, marker: &Marker) -> Option<Digest> {
        let whole = marker.dirs.values().all(Option::is_some);
        let revision = marker.revision.filter(|revision| whole && revision.data == marker.data_digest())?;
        let whole = marker.modules.values().all(Option::is_some);
        let is_held =
            self.delivery == Delivery::Bundle || whole && revision.modules == marker.modules_digest();
        is_held.then_some(revision.modules)
    }

    /// The same. OPA is offered these modules again, where the hub still has them; else the stream leads to newer ones.
    async fn resumable(&mut self, marker: &Marker) -> Result<Option<Digest>, Trouble> {
        let Some(modules) = self.believed(marker) else { return Ok(None) };
        if self.delivery == Delivery::Bundle {
            self.local.serve(self.policy_bundle(modules).await?);
        }
        Ok(Some(modules))
    }

    /// Warns, once, where packages make OPA slow at taking data.
    fn note_layout(&self, marker: &Marker) {
        let notice = self.layout.notice(marker);
        let is_news = self.status.with(|state| {
            let is_news = state.notice != notice;
            state.notice.clone_from(&notice);
            is_news
        });
        if let Some(notice) = notice.filter(|_| is_news) {
            tracing::warn!("{notice}");
        }
    }

    fn note(&self, held: &Held) {
        self.status.with(|state| {
            state.said = Some(held.revision());
            state.held = held.marker.revision;
        });
    }
}

/// A hub that had what OPA holds may still be behind the one that it came from: it has been there before.
fn lags(lag: &Lag) -> pull::Error {
    pull::Error::Lags(lag.to_string())
}

/// Answers to reconcile that may be needed at a start: one that holds what older policies read too, and one without.
const RECONCILES_MAX: usize = 2;

/// Time below which a session that another writer or a hub that stops ended is followed by a pause: two agents of one
/// OPA, or a hub that sends all away, would be met as fast as the network goes.
const SESSION_MIN: Duration = Duration::from_secs(1);
/// OPA starts within a second; it is looked for often, since until then nothing is decided.
const OPA_RETRY_MAX: Duration = Duration::from_millis(500);
const _: () = assert!(OPA_RETRY_MAX.as_millis() <= RETRY_MAX.as_millis());

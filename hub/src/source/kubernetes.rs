//! The Kubernetes API as a source: one watch a feed, selected on the server, opened as a streaming list with the paged
//! list as the fallback.

mod watch;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{ApiResource, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::DynamicResourceScope;
use kube::discovery::{self, ApiCapabilities, ApiGroup, Discovery, verbs};
use kube::{Api, Client, Config};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use self::watch::{List, Said, Watch};
use super::{Sender, trim};
use crate::config::{RETRY, RETRY_MAX, SOURCE_ANSWER};
use crate::model::{Event, Feed, ObjectKey, Resource, Scope, Version, WatchId};
use crate::readiness::Readiness;
use crate::store::{Wanted, is_optional};

/// Why no client could be made, or why a feed is not watched right now. Every variant of the second kind is retried.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kubeconfig file or its contents.
    #[error("cannot use kubeconfig {path}: {source}")]
    Kubeconfig {
        /// The file.
        path: String,
        /// What is wrong with it.
        source: kube::config::KubeconfigError,
    },
    /// Neither a kubeconfig nor a cluster around.
    #[error("found no cluster: give --kubeconfig FILE or --manifests DIR, or run inside a cluster ({0})")]
    NoCluster(kube::config::InferConfigError),
    /// The client could not be built from the configuration.
    #[error("cannot build a Kubernetes client: {0}")]
    Client(kube::Error),
    /// The API server could not be asked what it serves.
    #[error("cannot ask the API server for {resource}: {source}")]
    Discover {
        /// What was looked for.
        resource: Resource,
        /// What went wrong.
        source: kube::Error,
    },
    /// A CRD to come, or a misspelling.
    #[error("the API server does not serve {0}: waiting for it (is a CRD to come, or the name misspelt?)")]
    NotServed(Resource),
    /// `--replicate` for a cluster-scoped resource, or the other way round.
    #[error("{resource} is {actual}: give it to {flag} instead")]
    WrongScope {
        /// The resource.
        resource: Resource,
        /// What it is.
        actual: &'static str,
        /// Where it belongs.
        flag: &'static str,
    },
    /// RBAC.
    #[error("forbidden: grant the hub the verbs {verbs} on {resource}{place} ({message})")]
    Forbidden {
        /// The missing verbs.
        verbs: String,
        /// The resource.
        resource: Resource,
        /// `" in namespace x"` or nothing.
        place: String,
        /// The API server's words.
        message: String,
    },
    /// Anything else: the network, an overloaded server, an expired token.
    #[error("the watch failed: {0}")]
    Watch(watch::Error),
}

impl Error {
    /// Whether the API server says no, as it would to any replica.
    fn is_refusal(&self) -> bool {
        match self {
            Self::NotServed(_) | Self::Forbidden { .. } | Self::WrongScope { .. } => true,
            Self::Watch(error) => error.code() == Some(404),
            Self::Discover { source, .. } => status_code(source) == Some(403),
            _ => false,
        }
    }
}

/// A client for the cluster that `kubeconfig`, the environment or the pod says.
pub async fn client(kubeconfig: Option<&Path>) -> Result<Client, Error> {
    let config = match kubeconfig {
        None => Config::infer().await.map_err(Error::NoCluster)?,
        Some(path) => {
            let wrap = |source| Error::Kubeconfig { path: path.display().to_string(), source };
            let file = Kubeconfig::read_from(path).map_err(wrap)?;
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(wrap)?
        }
    };
    Client::try_from(config).map_err(Error::Client)
}

/// Watches what is wanted, for as long as it is, until the store is gone.
pub async fn run(client: Client, mut wanted: Wanted, out: Sender, readiness: Readiness) {
    let mut running: BTreeMap<WatchId, (Feed, JoinHandle<()>)> = BTreeMap::new();
    loop {
        let now = wanted.borrow_and_update().clone();
        for (id, (feed, watching)) in running.extract_if(.., |id, _| !now.contains_key(id)) {
            watching.abort();
            readiness.for_watch(id).problem(&feed.to_string(), None);
        }
        for (id, feed) in now {
            running.entry(id).or_insert_with(|| {
                let readiness = readiness.for_watch(id);
                let watching = keep_watching(client.clone(), id, feed.clone(), out.clone(), readiness);
                (feed, tokio::spawn(watching))
            });
        }
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            () = out.closed() => return,
        }
    }
}

/// Watches until the store is gone. Whatever goes wrong is said in `readiness` and tried again.
async fn keep_watching(client: Client, id: WatchId, feed: Feed, out: Sender, readiness: Readiness) {
    let name = feed.to_string();
    let mut list = List::Streaming;
    let mut retry = RETRY;
    while !out.is_closed() {
        let found = timeout(SOURCE_ANSWER, discover(&client, &feed)).await;
        let error = match found.unwrap_or(Err(Error::Watch(watch::Error::Silent))) {
            Err(error) => error,
            Ok((resource, scope)) => {
                let feed = Feed { scope, ..feed.clone() };
                let api: Api<Raw> = match &feed.scope {
                    Scope::Namespace(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
                    _ => Api::all_with(client.clone(), &resource),
                };
                let watch = Watch::new(api, feed.label_selector(), feed.field_selector(), list);
                let following = Following { resource, id, name: &name, out: &out, readiness: &readiness };
                match following.run(watch, &mut retry).await {
                    End::StoreGone => return,
                    End::NoStreamingList => {
                        tracing::info!(feed = name, "no streaming list here, listing by pages");
                        list = List::Paged;
                        continue;
                    }
                    End::Failed(error) if error.code() == Some(403) => {
                        let named = timeout(SOURCE_ANSWER, forbidden(&client, &feed, &error)).await;
                        named.unwrap_or(Error::Watch(error))
                    }
                    End::Failed(error) => Error::Watch(error),
                }
            }
        };
        if out.send((id, Event::Unavailable, None)).await.is_err() {
            return;
        }
        if error.is_refusal() && out.send((id, Event::Refused, None)).await.is_err() {
            return;
        }
        if !(is_optional(&feed.content) && matches!(error, Error::NotServed(_))) {
            tracing::warn!(feed = name, %error, "not watching");
            readiness.failing(&name, &error.to_string());
        }
        pause(&mut retry).await;
    }
}

/// Replicas that failed together do not come back together.
async fn pause(retry: &mut Duration) {
    tokio::time::sleep(retry.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
    *retry = (*retry * 2).min(RETRY_MAX);
}

/// Streaming lists that break off in a row before lists come by pages.
const CUTS_MAX: usize = 2;

enum End {
    StoreGone,
    /// The server refused the streaming list itself.
    NoStreamingList,
    Failed(watch::Error),
}

struct Following<'a> {
    resource: ApiResource,
    id: WatchId,
    /// The name that problems of the watch are reported under.
    name: &'a str,
    out: &'a Sender,
    readiness: &'a Readiness,
}

impl Following<'_> {
    /// Forwards what `watch` says; a failure that it goes on from is waited out here.
    async fn run(&self, mut watch: Watch, retry: &mut Duration) -> End {
        // What failed before is reported until the server serves the watch or has completed a list, and pauses stay as
        // long until all went well for a while.
        let (mut is_failing, mut failed) = (true, Instant::now());
        let mut cuts = 0;
        loop {
            match watch.next().await {
                // A list by pages begins before the server was asked: that is no success yet.
                Ok(Said::Begin) => {
                    if self.out.send((self.id, Event::Init, None)).await.is_err() {
                        return End::StoreGone;
                    }
                }
                Ok(said) => {
                    if !matches!(said, Said::Listed(_)) && std::mem::take(&mut is_failing) {
                        self.readiness.problem(self.name, None);
                    }
                    if failed.elapsed() > RETRY_MAX {
                        *retry = RETRY;
                    }
                    if let Said::End(_) = said {
                        cuts = 0;
                    }
                    let (event, version) = self.translate(said);
                    if self.out.send((self.id, event, version)).await.is_err() {
                        return End::StoreGone;
                    }
                }
                Err(watch::Error::NoStreamingList(_)) => return End::NoStreamingList,
                Err(error) => {
                    (is_failing, failed) = (true, Instant::now());
                    // A server may go away in the middle of a list; one that does not know the question never ends it.
                    cuts += usize::from(matches!(error, watch::Error::Cut));
                    match error.code() {
                        _ if cuts >= CUTS_MAX => return End::NoStreamingList,
                        // The resource or the right to it is gone: look again from the start.
                        Some(403 | 404) => return End::Failed(error),
                        _ => {}
                    }
                    self.wait_out(error, retry).await;
                }
            }
        }
    }

    async fn wait_out(&self, error: watch::Error, retry: &mut Duration) {
        tracing::warn!(feed = self.name, %error, "watch interrupted");
        self.readiness.failing(self.name, &Error::Watch(error).to_string());
        pause(retry).await;
    }

    fn translate(&self, said: Said) -> (Event, Option<Version>) {
        match said {
            Said::Begin => (Event::Init, None),
            Said::End(version) => (Event::InitDone, watch::version(&version)),
            Said::Quiet(version) => (Event::Quiet, watch::version(&version)),
            Said::Listed(raw) | Said::Put(raw) => (self.put(&raw), raw.version()),
            Said::Gone(raw) => (Event::Delete(key(&raw)), raw.version()),
        }
    }

    /// What cannot be served is not there, or a replica that lists it would differ.
    fn put(&self, raw: &Raw) -> Event {
        match trim::object(raw.json.get(), &self.resource.api_version, &self.resource.kind) {
            Ok(object) => Event::Apply(object),
            Err(error) => {
                tracing::warn!(feed = self.name, %error, "left out an object");
                Event::Delete(key(raw))
            }
        }
    }
}

fn key(raw: &Raw) -> ObjectKey {
    let text = |text: &Option<String>| text.as_deref().unwrap_or_default().into();
    ObjectKey { namespace: text(&raw.metadata.namespace), name: text(&raw.metadata.name) }
}

/// Finds the resource's kind, which the items of a paged list do not carry, and where its objects are.
async fn discover(client: &Client, feed: &Feed) -> Result<(ApiResource, Scope), Error> {
    let resource = &feed.resource;
    if resource.is_named_only() {
        return discover_by_name(client, feed).await;
    }
    let found = if resource.group.is_empty() {
        client.list_core_api_resources(&resource.version).await
    } else {
        client.list_api_group_resources(&resource.api_version()).await
    };
    let list = match found {
        Ok(list) => list,
        Err(error) if status_code(&error) == Some(404) => return Err(Error::NotServed(resource.clone())),
        Err(source) => return Err(Error::Discover { resource: resource.clone(), source }),
    };
    let served = list.resources.into_iter().find(|served| served.name == resource.plural);
    let served = served.ok_or_else(|| Error::NotServed(resource.clone()))?;
    match (&feed.scope, served.namespaced) {
        (Scope::Cluster, true) => {
            Err(Error::WrongScope { resource: resource.clone(), actual: "namespaced", flag: "--replicate" })
        }
        (Scope::Namespaces { .. } | Scope::Namespace(_), false) => Err(Error::WrongScope {
            resource: resource.clone(),
            actual: "cluster-scoped",
            flag: "--replicate-cluster",
        }),
        (scope, _) => {
            let found = ApiResource {
                group: resource.group.clone(),
                version: resource.version.clone(),
                api_version: resource.api_version(),
                kind: served.kind,
                plural: resource.plural.clone(),
            };
            Ok((found, scope.clone()))
        }
    }
}

/// The resource of this name that can be watched: in the core group, else in the first by alphabet.
async fn discover_by_name(client: &Client, feed: &Feed) -> Result<(ApiResource, Scope), Error> {
    let resource = &feed.resource;
    let discovery = match Discovery::new(client.clone()).run_aggregated().await {
        // Aggregated discovery came with Kubernetes 1.27.
        Err(_) => Discovery::new(client.clone()).run().await,
        found => found,
    };
    let wrap = |source| Error::Discover { resource: resource.clone(), source };
    let discovery = discovery.map_err(wrap)?;
    let mut groups = discovery.groups_alphabetical();
    groups.sort_by_key(|group| !group.name().is_empty());
    let served = groups.into_iter().flat_map(ApiGroup::recommended_resources);
    let can = |can: &ApiCapabilities, verb| can.supports_operation(verb);
    let found = served.into_iter().find(|(served, capabilities)| {
        served.plural == resource.plural && can(capabilities, verbs::LIST) && can(capabilities, verbs::WATCH)
    });
    let (found, capabilities) = found.ok_or_else(|| Error::NotServed(resource.clone()))?;
    let is_cluster = capabilities.scope == discovery::Scope::Cluster;
    Ok((found, if is_cluster { Scope::Cluster } else { feed.scope.clone() }))
}

/// Asks which of the verbs are missing: the API server's message names only the first.
async fn forbidden(client: &Client, feed: &Feed, error: &watch::Error) -> Error {
    let namespace = match &feed.scope {
        Scope::Namespace(namespace) => Some(namespace.clone()),
        _ => None,
    };
    let reviews: Api<SelfSubjectAccessReview> = Api::all(client.clone());
    let mut missing = Vec::new();
    for verb in ["list", "watch"] {
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(ResourceAttributes {
                    group: Some(feed.resource.group.clone()),
                    resource: Some(feed.resource.plural.clone()),
                    verb: Some(verb.into()),
                    namespace: namespace.clone(),
                    ..Default::default()
                }),
                ..Default::default()
            },
            ..Default::default()
        };
        let allowed = reviews.create(&PostParams::default(), &review).await;
        if !allowed.is_ok_and(|review| review.status.is_some_and(|status| status.allowed)) {
            missing.push(verb);
        }
    }
    Error::Forbidden {
        verbs: missing.join(", "),
        resource: feed.resource.clone(),
        place: namespace.map(|namespace| format!(" in namespace {namespace}")).unwrap_or_default(),
        message: error.to_string(),
    }
}

fn status_code(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}

/// An object of any kind: its metadata, and its text as it came.
#[derive(Clone, Debug)]
struct Raw {
    metadata: ObjectMeta,
    json: Box<RawValue>,
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Outline {
            metadata: Metadata,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Metadata {
            name: Option<String>,
            namespace: Option<String>,
            resource_version: Option<String>,
        }
        let json = Box::<RawValue>::deserialize(deserializer)?;
        let Outline { metadata } = serde_json::from_str(json.get()).map_err(D::Error::custom)?;
        let Metadata { name, namespace, resource_version } = metadata;
        let metadata = ObjectMeta { name, namespace, resource_version, ..ObjectMeta::default() };
        Ok(Self { metadata, json })
    }
}

impl Raw {
    fn version(&self) -> Option<Version> {
        watch::version(self.metadata.resource_version.as_deref()?)
    }
}

impl kube::Resource for Raw {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(resource: &ApiResource) -> Cow<'_, str> {
        Cow::Borrowed(&resource.kind)
    }

    fn group(resource: &ApiResource) -> Cow<'_, str> {
        Cow::Borrowed(&resource.group)
    }

    fn version(resource: &ApiResource) -> Cow<'_, str> {
        Cow::Borrowed(&resource.version)
    }

    fn plural(resource: &ApiResource) -> Cow<'_, str> {
        Cow::Borrowed(&resource.plural)
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

#[cfg(test)]
mod tests;

//! Watches of a Kubernetes API server.

mod watcher;

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
use kube::discovery::{self, ApiGroup, Discovery, verbs};
use kube::{Api, Client, Config};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use crate::backoff::{BACKOFF_MAX, BACKOFF_MIN, increased};
use crate::health::Health;
use crate::model::{
    Event, NamespaceSelector, ObjectKey, Resource, Version, WatchId, WatchSet, WatchSpec, is_optional,
};
use crate::source::kubernetes::watcher::{InitialListStrategy, SOURCE_ANSWER, Watcher};
use crate::source::{Sender, normalize};

/// Failure of the client or of a watch, which is retried.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Missing or invalid kubeconfig.
    #[error("reading kubeconfig {path} failed: {source}")]
    Kubeconfig {
        /// File.
        path: String,
        /// Cause.
        source: kube::config::KubeconfigError,
    },
    /// No cluster found.
    #[error(
        "finding a cluster failed: {0}; set --kubeconfig FILE or --manifests DIR, or run inside a cluster"
    )]
    NoCluster(kube::config::InferConfigError),
    /// Invalid client configuration.
    #[error("building the Kubernetes client failed: {0}")]
    Client(kube::Error),
    /// Failed discovery.
    #[error("discovering {resource} failed: {source}")]
    Discover {
        /// Resource.
        resource: Resource,
        /// Cause.
        source: kube::Error,
    },
    /// Missing CRD or misspelled name.
    #[error("the API server does not serve {0}; install its CRD or correct the name")]
    NotServed(Resource),
    /// Flag of the other scope.
    #[error("{resource} is {actual}; use {flag} instead")]
    WrongScope {
        /// Resource.
        resource: Resource,
        /// Actual scope.
        actual: &'static str,
        /// Correct flag.
        flag: &'static str,
    },
    /// Missing RBAC permissions.
    #[error("forbidden: grant the hub the verbs {verbs} on {resource}{place} ({message})")]
    Forbidden {
        /// Missing verbs.
        verbs: String,
        /// Resource.
        resource: Resource,
        /// `" in namespace x"` or empty.
        place: String,
        /// API server's message.
        message: String,
    },
    /// Other failures of a watch.
    #[error("watch failed: {0}")]
    Watch(watcher::Error),
}

impl Error {
    fn is_denial(&self) -> bool {
        match self {
            Self::NotServed(_) | Self::Forbidden { .. } | Self::WrongScope { .. } => true,
            Self::Watch(error) => error.code() == Some(404),
            Self::Discover { source, .. } => status_code(source) == Some(403),
            _ => false,
        }
    }
}

/// Builds a client from `kubeconfig`, the environment or the pod.
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

/// Runs the `wanted` watches until the store closes.
pub async fn run(client: Client, mut wanted: WatchSet, out: Sender, readiness: Health) {
    let mut running: BTreeMap<WatchId, (WatchSpec, JoinHandle<()>)> = BTreeMap::new();
    loop {
        let specs = wanted.borrow_and_update().clone();
        for (id, (spec, task)) in running.extract_if(.., |id, _| !specs.contains_key(id)) {
            task.abort();
            readiness.for_watch(id).problem(&spec.to_string(), None);
        }
        for (id, spec) in specs {
            running.entry(id).or_insert_with(|| {
                let readiness = readiness.for_watch(id);
                let watch = supervise_watch(client.clone(), id, spec.clone(), out.clone(), readiness);
                (spec, tokio::spawn(watch))
            });
        }
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            () = out.closed() => return,
        }
    }
}

async fn supervise_watch(client: Client, id: WatchId, spec: WatchSpec, out: Sender, readiness: Health) {
    let name = spec.to_string();
    let mut strategy = InitialListStrategy::Streaming;
    let mut backoff = BACKOFF_MIN;
    while !out.is_closed() {
        let discovered = timeout(SOURCE_ANSWER, discover(&client, &spec)).await;
        let error = match discovered.unwrap_or(Err(Error::Watch(watcher::Error::Timeout))) {
            Err(error) => error,
            Ok((resource, scope)) => {
                let spec = WatchSpec { scope, ..spec.clone() };
                let api: Api<RawObject> = match &spec.scope {
                    NamespaceSelector::Only(namespace) => {
                        Api::namespaced_with(client.clone(), namespace, &resource)
                    }
                    _ => Api::all_with(client.clone(), &resource),
                };
                let watcher = Watcher::new(api, spec.label_selector(), spec.field_selector(), strategy);
                let session = WatchSession { resource, id, name: &name, out: &out, readiness: &readiness };
                match session.run(watcher, &mut backoff).await {
                    WatchExit::StoreClosed => return,
                    WatchExit::NoStreamingList => {
                        tracing::info!(watch = name, "streaming list not supported, using pages");
                        strategy = InitialListStrategy::Paged;
                        continue;
                    }
                    WatchExit::Failed(error) if error.code() == Some(403) => {
                        let detailed =
                            timeout(SOURCE_ANSWER, missing_permissions(&client, &spec, &error)).await;
                        detailed.unwrap_or(Error::Watch(error))
                    }
                    WatchExit::Failed(error) => Error::Watch(error),
                }
            }
        };
        if out.send((id, Event::Failed, None)).await.is_err() {
            return;
        }
        if error.is_denial() && out.send((id, Event::Denied, None)).await.is_err() {
            return;
        }
        if !(is_optional(&spec.content) && matches!(error, Error::NotServed(_))) {
            tracing::warn!(watch = name, %error, "watch failed, retrying");
            readiness.failing(&name, &error.to_string());
        }
        sleep_backoff(&mut backoff).await;
    }
}

/// Jitter spreads replicas that failed together.
async fn sleep_backoff(backoff: &mut Duration) {
    tokio::time::sleep(backoff.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
    *backoff = increased(*backoff);
}

/// Incomplete streaming lists before the fallback to pages.
const INCOMPLETE_LISTS_MAX: usize = 2;

enum WatchExit {
    StoreClosed,
    NoStreamingList,
    Failed(watcher::Error),
}

struct WatchSession<'a> {
    resource: ApiResource,
    id: WatchId,
    name: &'a str,
    out: &'a Sender,
    readiness: &'a Health,
}

impl WatchSession<'_> {
    async fn run(&self, mut watcher: Watcher, backoff: &mut Duration) -> WatchExit {
        // A failure is reported until a list completes or a watch is served.
        let (mut is_failing, mut failed_at) = (true, Instant::now());
        let mut incomplete_lists = 0;
        loop {
            match watcher.next().await {
                // Paged lists begin without a request: no success yet.
                Ok(watcher::Event::Init) => {
                    if self.out.send((self.id, Event::Init, None)).await.is_err() {
                        return WatchExit::StoreClosed;
                    }
                }
                Ok(event) => {
                    if !matches!(event, watcher::Event::InitApply(_)) && std::mem::take(&mut is_failing) {
                        self.readiness.problem(self.name, None);
                    }
                    if failed_at.elapsed() > BACKOFF_MAX {
                        *backoff = BACKOFF_MIN;
                    }
                    if let watcher::Event::InitDone(_) = event {
                        incomplete_lists = 0;
                    }
                    let (event, version) = self.translate(event);
                    if self.out.send((self.id, event, version)).await.is_err() {
                        return WatchExit::StoreClosed;
                    }
                }
                Err(watcher::Error::NoStreamingList(_)) => return WatchExit::NoStreamingList,
                Err(error) => {
                    (is_failing, failed_at) = (true, Instant::now());
                    // Servers without streaming lists may never complete one.
                    incomplete_lists += usize::from(matches!(error, watcher::Error::IncompleteList));
                    match error.code() {
                        _ if incomplete_lists >= INCOMPLETE_LISTS_MAX => return WatchExit::NoStreamingList,
                        // Rediscover: CRDs or RBAC changed.
                        Some(403 | 404) => return WatchExit::Failed(error),
                        _ => {}
                    }
                    self.back_off(error, backoff).await;
                }
            }
        }
    }

    async fn back_off(&self, error: watcher::Error, backoff: &mut Duration) {
        tracing::warn!(watch = self.name, %error, "watch interrupted, retrying");
        self.readiness.failing(self.name, &Error::Watch(error).to_string());
        sleep_backoff(backoff).await;
    }

    fn translate(&self, event: watcher::Event) -> (Event, Option<Version>) {
        match event {
            watcher::Event::Init => (Event::Init, None),
            watcher::Event::InitDone(version) => (Event::InitDone, watcher::version(&version)),
            watcher::Event::Bookmark(version) => (Event::Bookmark, watcher::version(&version)),
            watcher::Event::InitApply(raw) | watcher::Event::Apply(raw) => {
                (self.normalize(&raw), raw.version())
            }
            watcher::Event::Delete(raw) => (Event::Delete(object_key(&raw)), raw.version()),
        }
    }

    /// Invalid objects count as deleted, so that replicas agree.
    fn normalize(&self, raw: &RawObject) -> Event {
        match normalize::object(raw.json.get(), &self.resource.api_version, &self.resource.kind) {
            Ok(object) => Event::Apply(object),
            Err(error) => {
                let object = object_key(raw);
                tracing::warn!(watch = self.name, %object, %error, "invalid object skipped");
                Event::Delete(object)
            }
        }
    }
}

fn object_key(raw: &RawObject) -> ObjectKey {
    let text = |field: &Option<String>| field.as_deref().unwrap_or_default().into();
    ObjectKey { namespace: text(&raw.metadata.namespace), name: text(&raw.metadata.name) }
}

/// Finds the kind, which list items lack, and the scope.
async fn discover(client: &Client, spec: &WatchSpec) -> Result<(ApiResource, NamespaceSelector), Error> {
    let resource = &spec.resource;
    if resource.is_named_only() {
        return discover_by_name(client, spec).await;
    }
    let response = if resource.group.is_empty() {
        client.list_core_api_resources(&resource.version).await
    } else {
        client.list_api_group_resources(&resource.api_version()).await
    };
    let list = match response {
        Ok(list) => list,
        Err(error) if status_code(&error) == Some(404) => return Err(Error::NotServed(resource.clone())),
        Err(source) => return Err(Error::Discover { resource: resource.clone(), source }),
    };
    let served = list.resources.into_iter().find(|served| served.name == resource.plural);
    let served = served.ok_or_else(|| Error::NotServed(resource.clone()))?;
    match (&spec.scope, served.namespaced) {
        (NamespaceSelector::ClusterScoped, true) => {
            Err(Error::WrongScope { resource: resource.clone(), actual: "namespaced", flag: "--replicate" })
        }
        (NamespaceSelector::AllExcept { .. } | NamespaceSelector::Only(_), false) => Err(Error::WrongScope {
            resource: resource.clone(),
            actual: "cluster-scoped",
            flag: "--replicate-cluster",
        }),
        (scope, _) => {
            let resource = ApiResource {
                group: resource.group.clone(),
                version: resource.version.clone(),
                api_version: resource.api_version(),
                kind: served.kind,
                plural: resource.plural.clone(),
            };
            Ok((resource, scope.clone()))
        }
    }
}

/// Prefers the core group, then alphabetical order.
async fn discover_by_name(
    client: &Client,
    spec: &WatchSpec,
) -> Result<(ApiResource, NamespaceSelector), Error> {
    let resource = &spec.resource;
    let discovery = match Discovery::new(client.clone()).run_aggregated().await {
        // Aggregated discovery needs Kubernetes 1.27.
        Err(_) => Discovery::new(client.clone()).run().await,
        discovery => discovery,
    };
    let wrap = |source| Error::Discover { resource: resource.clone(), source };
    let discovery = discovery.map_err(wrap)?;
    let mut groups = discovery.groups_alphabetical();
    groups.sort_by_key(|group| !group.name().is_empty());
    let served = groups.into_iter().flat_map(ApiGroup::recommended_resources);
    let found = served.into_iter().find(|(served, capabilities)| {
        served.plural == resource.plural
            && capabilities.supports_operation(verbs::LIST)
            && capabilities.supports_operation(verbs::WATCH)
    });
    let (found, capabilities) = found.ok_or_else(|| Error::NotServed(resource.clone()))?;
    let is_cluster = capabilities.scope == discovery::Scope::Cluster;
    Ok((found, if is_cluster { NamespaceSelector::ClusterScoped } else { spec.scope.clone() }))
}

/// The API server's message names only the first missing verb.
async fn missing_permissions(client: &Client, spec: &WatchSpec, error: &watcher::Error) -> Error {
    let namespace = match &spec.scope {
        NamespaceSelector::Only(namespace) => Some(namespace.clone()),
        _ => None,
    };
    let reviews: Api<SelfSubjectAccessReview> = Api::all(client.clone());
    let mut missing = Vec::new();
    for verb in ["list", "watch"] {
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(ResourceAttributes {
                    group: Some(spec.resource.group.clone()),
                    resource: Some(spec.resource.plural.clone()),
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
        resource: spec.resource.clone(),
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

#[derive(Clone, Debug)]
struct RawObject {
    metadata: ObjectMeta,
    json: Box<RawValue>,
}

impl<'de> Deserialize<'de> for RawObject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Header {
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
        let Header { metadata } = serde_json::from_str(json.get()).map_err(D::Error::custom)?;
        let Metadata { name, namespace, resource_version } = metadata;
        let metadata = ObjectMeta { name, namespace, resource_version, ..ObjectMeta::default() };
        Ok(Self { metadata, json })
    }
}

impl RawObject {
    fn version(&self) -> Option<Version> {
        watcher::version(self.metadata.resource_version.as_deref()?)
    }
}

impl kube::Resource for RawObject {
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

//! The command line: kube-mgmt's flags for what is watched, ours for where it goes.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use opa_hub_proto::flag::{boolean, listen_address};
use opa_hub_proto::path::{DirPath, is_segment};

use crate::bundle::fields::{Fields, InvalidField};
use crate::bundle::kept::Kept;
use crate::bundle::spec::{
    self, AutoReplication, Follows, Scoped, Selection, Spec, configmap_feeds, is_label, is_label_value,
    is_reserved,
};
use crate::config::BundleLimits;
use crate::config::{Config, Source};
use crate::model::{Condition, Content, Feed, LabelTerm, Resource, Scope};
use crate::policy::check::Dialect;

/// opa-hub watches a Kubernetes API server once and serves its policies, JSON data and replicated resources to every
/// OPA: as bundles to OPA itself, as a delta stream to opa-hub-agent.
///
/// With --manifests it reads a folder instead of a cluster. With neither --manifests nor --kubeconfig it takes
/// KUBECONFIG, ~/.kube/config or the pod's service account.
#[derive(Parser, Debug)]
#[command(version, name = "opa-hub", args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    flags: Flags,
}

/// What the program does instead of serving.
#[derive(Subcommand, Debug)]
enum Command {
    /// Show which fields of replicated objects the policies of a folder read, and what they are of all bytes
    Fields(Box<Flags>),
}

/// What is to be done.
pub enum Task {
    /// Serve for ever.
    Serve(Config),
    /// Show fields.
    Fields(Config),
}

/// All flags.
#[derive(Args, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
pub struct Flags {
    /// Read this folder of manifests (YAML or JSON, watched for changes) instead of a cluster
    #[arg(long, value_name = "DIR", env = "OPA_HUB_MANIFESTS", conflicts_with = "kubeconfig")]
    manifests: Option<PathBuf>,
    /// Serve the bundles of this file too: documents of kind Bundle, read again when it changes. Documents of the
    /// source are followed without a flag
    #[arg(long, value_name = "FILE", env = "OPA_HUB_CONFIG")]
    config: Option<PathBuf>,
    /// Reach the API server by this kubeconfig
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Serve bundles, streams, the dashboard and metrics here
    #[arg(long, value_name = "ADDR", env = "OPA_HUB_LISTEN", default_value = "127.0.0.1:8080", value_parser = listen_address)]
    listen: SocketAddr,
    /// Serve /health, /livez and /readyz here too
    #[arg(long, value_name = "ADDR", env = "OPA_HUB_HEALTH_ENDPOINT", value_parser = listen_address)]
    health_endpoint: Option<SocketAddr>,
    /// The replicas of this hub, this one among them or not, as agents reach them. When it stops it tells its agents
    /// which of them are ready. A name with many addresses, such as that of a headless Service, stands for all of them
    #[arg(long, value_name = "HOST:PORT,…", env = "OPA_HUB_REPLICAS", value_delimiter = ',', value_parser = host_port)]
    replicas: Vec<String>,
    /// The bundle's name, as in /bundles/NAME
    #[arg(long, value_name = "NAME", env = "OPA_HUB_BUNDLE", default_value = "main")]
    bundle: String,

    /// Namespaces to take policies and data from; * for all, which needs the right to list ConfigMaps everywhere
    #[arg(
        long,
        value_name = "NS,…",
        value_delimiter = ',',
        default_value = "*",
        help_heading = "Policies and data"
    )]
    namespaces: Vec<String>,
    /// Take policies from labelled ConfigMaps
    #[arg(long, value_name = "BOOL", default_value_t = true, default_missing_value = "true", num_args = 0..=1,
          require_equals = true, action = ArgAction::Set, value_parser = boolean, help_heading = "Policies and data")]
    enable_policies: bool,
    /// The label that marks a ConfigMap with policies
    #[arg(
        long,
        value_name = "LABEL",
        default_value = "openpolicyagent.org/policy",
        help_heading = "Policies and data"
    )]
    policy_label: String,
    /// The value that this label must have
    #[arg(long, value_name = "VALUE", default_value = "rego", help_heading = "Policies and data")]
    policy_value: String,
    /// Take JSON data from labelled ConfigMaps
    #[arg(long, value_name = "BOOL", default_value_t = true, default_missing_value = "true", num_args = 0..=1,
          require_equals = true, action = ArgAction::Set, value_parser = boolean, help_heading = "Policies and data")]
    enable_data: bool,
    /// The label that marks a ConfigMap with data; it wins where both labels are set
    #[arg(
        long,
        value_name = "LABEL",
        default_value = "openpolicyagent.org/data",
        help_heading = "Policies and data"
    )]
    data_label: String,
    /// The value that this label must have
    #[arg(long, value_name = "VALUE", default_value = "opa", help_heading = "Policies and data")]
    data_value: String,

    /// Replicate a namespaced resource, e.g. v1/pods or apps/v1/deployments; may be given many times
    #[arg(
        long,
        value_name = "[GROUP/]VERSION/RESOURCE",
        value_delimiter = ',',
        help_heading = "Replication"
    )]
    replicate: Vec<Resource>,
    /// Replicate a cluster-scoped resource, e.g. v1/nodes; may be given many times
    #[arg(
        long,
        value_name = "[GROUP/]VERSION/RESOURCE",
        value_delimiter = ',',
        help_heading = "Replication"
    )]
    replicate_cluster: Vec<Resource>,
    /// Replicate the resources that policies read below data.PATH too, for as long as one does: which they are is asked
    /// of OPA, which group serves a name of the API server
    #[arg(long, value_name = "BOOL", default_value_t = false, default_missing_value = "true", num_args = 0..=1,
          require_equals = true, action = ArgAction::Set, value_parser = boolean, help_heading = "Replication")]
    replicate_auto: bool,
    /// Where below data the resources go: data.PATH.resource.namespace.name
    #[arg(long, value_name = "PATH", default_value = "kubernetes", help_heading = "Replication")]
    replicate_path: String,
    /// What of replicated resources each reader gets: all namespaces, or those of the one that it names (?namespace=,
    /// or the agent's --namespace) and what belongs to none
    #[arg(long, value_name = "SCOPE", default_value = "cluster", help_heading = "Replication")]
    replicate_scope: ReplicateScope,
    /// The fields of replicated objects that travel: auto for those that the policies read, paths such as
    /// metadata.labels,spec.containers[*].image (what a policy reads beyond is undefined), all for everything, and
    /// paths beside auto for what others read. `opa-hub fields` shows what your policies read
    #[arg(
        long,
        value_name = "PATH,…",
        value_delimiter = ',',
        default_value = "all",
        help_heading = "Replication"
    )]
    fields: Vec<String>,
    /// With --fields auto: only what these decisions and those annotated as entrypoints come to read, e.g. authz/allow;
    /// every rule, when there are none
    #[arg(long, value_name = "PATH,…", value_delimiter = ',', help_heading = "Replication")]
    entrypoints: Vec<String>,
    /// Refuse what would make the data of the bundle larger than this, as JSON: plain bytes, or e.g. 64Mi
    #[arg(long, value_name = "BYTES", value_parser = bytes, help_heading = "Replication")]
    max_bytes: Option<usize>,
    /// Namespaces whose objects are not replicated
    #[arg(long, value_name = "NS,…", value_delimiter = ',', help_heading = "Replication")]
    replicate_ignore_namespaces: Vec<String>,

    /// The OPA that checks policies before any other OPA gets them; the `opa` on the search path when not given, and
    /// where there is none, a parser that sees syntax only
    #[arg(long, value_name = "FILE", env = "OPA_BIN", help_heading = "Checking policies")]
    opa_bin: Option<PathBuf>,
    /// Check policies as OPA before 1.0 takes them, and say so in the bundle
    #[arg(long, conflicts_with = "v1_compatible", help_heading = "Checking policies")]
    v0_compatible: bool,
    /// Check policies as OPA from 1.0 on takes them, and say so in the bundle
    #[arg(long, help_heading = "Checking policies")]
    v1_compatible: bool,
    /// Run the keys that end in _test.rego of ConfigMaps that carry this label with the value true, instead of serving
    /// them: a ConfigMap whose tests fail is refused
    #[arg(long, value_name = "LABEL", help_heading = "Checking policies")]
    test_label: Option<String>,
    /// Keep the last good policies in this folder, so that a restart keeps them while a newer text is bad; in a cluster
    /// they are kept in a ConfigMap when this is not given
    #[arg(long, value_name = "DIR", env = "OPA_HUB_STATE_DIR", help_heading = "Checking policies")]
    state_dir: Option<PathBuf>,
    /// Write to each ConfigMap what was said of it, as kube-mgmt does, and as an Event when it is refused
    #[arg(long, value_name = "BOOL", default_value_t = true, default_missing_value = "true", num_args = 0..=1,
          require_equals = true, action = ArgAction::Set, value_parser = boolean, help_heading = "Checking policies")]
    write_verdicts: bool,
    /// The hub's own namespace, for its Lease and its last good policies [default: the pod's, or the kubeconfig's]
    #[arg(long, value_name = "NS", env = "POD_NAMESPACE", help_heading = "Checking policies")]
    namespace: Option<String>,

    /// What is logged: error, warn, info, debug, trace (RUST_LOG says it in detail)
    #[arg(
        long,
        value_name = "LEVEL",
        env = "OPA_HUB_LOG_LEVEL",
        default_value = "info",
        value_parser = level,
        help_heading = "Logging"
    )]
    log_level: tracing::Level,
    /// How it is logged
    #[arg(
        long,
        value_name = "FORMAT",
        env = "OPA_HUB_LOG_FORMAT",
        default_value = "text",
        help_heading = "Logging"
    )]
    log_format: LogFormat,
}

/// Whose objects a reader gets.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum ReplicateScope {
    /// Those of all namespaces
    Cluster,
    /// Those of the namespace that it names
    Namespace,
}

/// How log lines look.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Flags that parse one by one and make no sense together.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// A bundle's name goes into URLs and paths.
    #[error("--bundle {0:?}: use letters, digits, '.', '_' and '-'")]
    BundleName(String),
    /// No field of an object.
    #[error("--fields: {0}")]
    Fields(#[from] InvalidField),
    /// Everything and something.
    #[error("--fields: all is everything: give it alone")]
    AllFields,
    /// No decision.
    #[error("--entrypoints {0:?}: write package and rule, e.g. authz/allow")]
    Entrypoint(String),
    /// They narrow down what policies read.
    #[error("--entrypoints says what --fields auto looks at: give both")]
    EntrypointsAlone,
    /// No place below data.
    #[error("--replicate-path {0:?}: write segments of letters, digits, '.', '_' and '-', separated by '/'")]
    ReplicatePath(String),
    /// A place that somebody else owns.
    #[error("--replicate-path {0:?} is a place of OPA itself or of opa-hub: choose another one")]
    Reserved(String),
    /// A namespace or label that the API server would refuse.
    #[error("{flag} {value:?} is not valid")]
    Value {
        /// The flag.
        flag: &'static str,
        /// What it was given.
        value: String,
    },
    /// Both would lie at one path.
    #[error("{first} and {second} would both be replicated to data.{path}: give only one of them")]
    SamePath {
        /// One of them.
        first: String,
        /// The other.
        second: String,
        /// Where both would lie.
        path: String,
    },
}

impl Cli {
    /// What is asked for.
    pub fn task(&self) -> Result<Task, Error> {
        match &self.command {
            None => self.flags.config().map(Task::Serve),
            Some(Command::Fields(flags)) => flags.config().map(Task::Fields),
        }
    }

    /// How it is to be logged.
    pub fn log(&self) -> (tracing::Level, LogFormat) {
        let flags = match &self.command {
            None => &self.flags,
            Some(Command::Fields(flags)) => flags,
        };
        (flags.log_level, flags.log_format)
    }
}

impl Flags {
    fn config(&self) -> Result<Config, Error> {
        if !is_segment(&self.bundle) {
            return Err(Error::BundleName(self.bundle.clone()));
        }
        let path = self.replicate_path.trim_matches('/');
        let replicate_path =
            DirPath::new(path.split('/')).map_err(|_| Error::ReplicatePath(self.replicate_path.clone()))?;
        if is_reserved(&replicate_path) {
            return Err(Error::Reserved(self.replicate_path.clone()));
        }
        let mut feeds = self.configmap_feeds()?;
        feeds.extend(self.resource_feeds(&replicate_path)?);
        let source = match &self.manifests {
            Some(dir) => Source::Folder(dir.clone()),
            None => Source::Kubernetes { kubeconfig: self.kubeconfig.clone() },
        };
        if let Some(namespace) = &self.namespace {
            check("--namespace", namespace, is_segment)?;
        }
        if let Some(label) = &self.test_label {
            check("--test-label", label, is_label)?;
        }
        let dialect = match (self.v0_compatible, self.v1_compatible) {
            (true, _) => Dialect::V0,
            (false, true) => Dialect::V1,
            (false, false) => Dialect::Default,
        };
        let fields = self.selection(&feeds)?;
        let auto = self
            .replicate_auto
            .then(|| AutoReplication { path: replicate_path.clone(), ignored: self.ignored() });
        let scoped = self.replicate_scope == ReplicateScope::Namespace;
        let spec = Spec {
            name: self.bundle.clone(),
            fields,
            scoped: scoped.then(|| Scoped { root: replicate_path, whole: BTreeSet::new() }),
            dialect,
            test_label: self.test_label.clone(),
            max_bytes: self.max_bytes,
            limits: BundleLimits::default(),
            feeds,
            auto,
        };
        let asks = !spec.feeds.is_empty() || spec.auto.is_some();
        Ok(Config {
            source,
            listen: self.listen,
            health: self.health_endpoint,
            replicas: self.replicas.clone(),
            bundle: self.bundle.clone(),
            flags: asks.then_some(spec),
            documents: self.config.clone(),
            opa: self.opa_bin.clone(),
            state_dir: self.state_dir.clone(),
            write_verdicts: self.write_verdicts,
            namespace: self.namespace.clone(),
        })
    }

    fn selection(&self, feeds: &[Feed]) -> Result<Selection, Error> {
        let paths = self.fields.iter().map(String::as_str).filter(|path| !matches!(*path, "all" | "auto"));
        let fields = Fields::parse(paths)?;
        let has = |word: &str| self.fields.iter().any(|path| path == word);
        let entrypoint =
            |text: &String| spec::entrypoint(text).ok_or_else(|| Error::Entrypoint(text.clone()));
        let entrypoints = self.entrypoints.iter().map(entrypoint).collect::<Result<Vec<_>, _>>()?;
        let (all, auto) = (has("all"), has("auto"));
        if all && self.fields.len() > 1 {
            return Err(Error::AllFields);
        }
        if !auto && !entrypoints.is_empty() {
            return Err(Error::EntrypointsAlone);
        }
        let places = feeds.iter().filter_map(Feed::place).filter(|_| auto).cloned().collect();
        Ok(Selection {
            given: Kept::alike(if all { Fields::all() } else { fields }),
            follows: Follows { places, others: auto && self.replicate_auto },
            entrypoints,
        })
    }

    fn configmap_feeds(&self) -> Result<Vec<Feed>, Error> {
        let label = |label_flag, label: &String, value_flag, value: &String| {
            check(label_flag, label, is_label)?;
            check(value_flag, value, is_label_value)?;
            Ok::<_, Error>(LabelTerm { label: label.clone(), is: Condition::In(vec![value.clone()]) })
        };
        let policy = label("--policy-label", &self.policy_label, "--policy-value", &self.policy_value)?;
        let data = label("--data-label", &self.data_label, "--data-value", &self.data_value)?;
        let mut contents = Vec::new();
        if self.enable_policies {
            let not_data = self.enable_data.then(|| LabelTerm {
                label: self.data_label.clone(),
                is: Condition::NotIn(vec![self.data_value.clone()]),
            });
            contents.push((Content::Policies, [policy].into_iter().chain(not_data).collect::<Vec<_>>()));
        }
        if self.enable_data {
            contents.push((Content::Data, vec![data]));
        }
        let mut scopes = Vec::new();
        for namespace in self.namespaces.iter().filter(|namespace| !namespace.is_empty()) {
            if namespace == "*" {
                scopes = vec![Scope::Namespaces { ignored: Vec::new() }];
                break;
            }
            check("--namespaces", namespace, is_segment)?;
            let scope = Scope::Namespace(namespace.clone());
            if !scopes.contains(&scope) {
                scopes.push(scope);
            }
        }
        let feeds = contents.iter().map(|(content, labels)| configmap_feeds(content, labels, &scopes));
        Ok(feeds.flatten().collect())
    }

    fn ignored(&self) -> Vec<String> {
        self.replicate_ignore_namespaces.iter().filter(|ns| !ns.is_empty()).cloned().collect()
    }

    fn resource_feeds(&self, path: &DirPath) -> Result<Vec<Feed>, Error> {
        let ignored = self.ignored();
        for namespace in &ignored {
            check("--replicate-ignore-namespaces", namespace, is_segment)?;
        }
        let namespaced =
            self.replicate.iter().map(|resource| (resource, Scope::Namespaces { ignored: ignored.clone() }));
        let cluster = self.replicate_cluster.iter().map(|resource| (resource, Scope::Cluster));
        let mut feeds: Vec<Feed> = Vec::new();
        let mut by_plural: HashMap<&str, &Resource> = HashMap::new();
        for (resource, scope) in namespaced.chain(cluster) {
            let prefix =
                path.join(&resource.plural).map_err(|_| Error::ReplicatePath(resource.to_string()))?;
            if let Some(first) = by_plural.insert(&resource.plural, resource) {
                if first == resource
                    && feeds.iter().any(|feed| feed.resource == *resource && feed.scope == scope)
                {
                    continue;
                }
                return Err(Error::SamePath {
                    first: first.to_string(),
                    second: resource.to_string(),
                    path: prefix.relative().replace('/', "."),
                });
            }
            feeds.push(Feed {
                resource: resource.clone(),
                scope,
                labels: Vec::new(),
                content: Content::Resource(prefix),
            });
        }
        Ok(feeds)
    }
}

/// A level by its name here or in kube-mgmt.
fn level(name: &str) -> Result<tracing::Level, String> {
    let name = match name {
        "warning" => "warn",
        "fatal" | "panic" => "error",
        other => other,
    };
    name.parse().map_err(|_| "write error, warn, info, debug or trace".to_owned())
}

fn bytes(text: &str) -> Result<usize, String> {
    spec::bytes(text).ok_or_else(|| "write a number of bytes, e.g. 67108864 or 64Mi".to_owned())
}

fn host_port(text: &str) -> Result<String, String> {
    let port =
        text.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port.parse::<u16>());
    match port {
        Some(Ok(_)) => Ok(text.to_owned()),
        _ => Err("write a name or an address and a port, e.g. opa-hub-replicas:8080".to_owned()),
    }
}

fn check(flag: &'static str, value: &str, valid: impl Fn(&str) -> bool) -> Result<(), Error> {
    if valid(value) { Ok(()) } else { Err(Error::Value { flag, value: value.to_owned() }) }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    /// Parses flags and compares the feeds, or the error, in words.
    fn check(flags: &str, expected: &[&str]) {
        let cli = Cli::try_parse_from(["opa-hub"].into_iter().chain(flags.split_whitespace())).unwrap();
        let said = match cli.flags.config() {
            Err(error) => vec![error.to_string()],
            Ok(config) => config
                .flags
                .iter()
                .flat_map(|spec| &spec.feeds)
                .map(|feed| format!("{feed} [{}] [{}]", feed.label_selector(), feed.field_selector()))
                .collect(),
        };
        assert_eq!(said.len(), expected.len(), "{flags}: {said:?}");
        for (said, expected) in said.iter().zip(expected) {
            assert!(said.contains(expected), "{flags}: {said}");
        }
    }

    #[test]
    fn flags_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn feeds_of_kube_mgmts_flags() {
        let policies =
            "policies (v1/configmaps) [openpolicyagent.org/policy=rego,openpolicyagent.org/data!=opa] []";
        let data = "data (v1/configmaps) [openpolicyagent.org/data=opa] []";
        check("", &[policies, data]);
        check("--enable-policies=false", &[data]);
        check(
            "--enable-data=false --namespaces a,b",
            &["policies (v1/configmaps in a) [openpolicyagent.org/policy=rego]", "in b"],
        );
        check("--namespaces=a,*", &[policies, data]);
        check(
            "--enable-data=false --replicate v1/pods,apps/v1/deployments --replicate-cluster v1/nodes --replicate-ignore-namespaces=kube-system,x",
            &[
                "policies",
                "v1/pods outside kube-system,x [] [metadata.namespace!=kube-system,metadata.namespace!=x]",
                "apps/v1/deployments",
                "v1/nodes [] []",
            ],
        );
        check("--replicate v1/pods --replicate v1/pods", &[policies, data, "v1/pods"]);
        check("--enable-policies=false --enable-data=false", &[]);
    }

    #[test]
    fn contradictions_are_told() {
        check(
            "--replicate v1/events --replicate events.k8s.io/v1/events",
            &["would both be replicated to data.kubernetes.events"],
        );
        check("--replicate v1/pods --replicate-cluster v1/pods", &["would both be"]);
        check("--fields auto,all", &["all is everything"]);
        check("--bundle a/b", &["--bundle"]);
        check("--replicate-path a//b", &["--replicate-path"]);
        check("--replicate-path system/a", &["choose another one"]);
        check("--policy-value a,b", &["--policy-value"]);
        check("--fields metadata.labels,a..b", &["--fields: \"a..b\" names no field"]);
    }
}

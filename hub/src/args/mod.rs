//! Command line. Flags of the watched objects are kube-mgmt's.

pub mod config;

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use opa_hub_proto::flag::{boolean, listen_address};
use opa_hub_proto::path::{DirPath, is_segment};

use crate::args::config::{Config, Source};
use crate::fields::mask::{FieldMask, InvalidField};
use crate::fields::masks::FieldMasks;
use crate::logging::LogFormat;
use crate::model::{Condition, Content, LabelTerm, NamespaceSelector, Resource, WatchSpec};
use crate::policy::check::Dialect;
use crate::snapshot::history::BundleLimits;
use crate::spec::{
    self, AutoFields, AutoReplication, BundleSpec, NamespaceScoping, Selection, configmap_feeds, is_label,
    is_label_value, is_reserved,
};

/// Watch a Kubernetes API server once and serve its policies, JSON data and replicated resources to every OPA.
///
/// Without --manifests and --kubeconfig, the cluster is that of KUBECONFIG, ~/.kube/config or the pod's service account.
#[derive(Parser, Debug)]
#[command(version, name = "opa-hub", args_conflicts_with_subcommands = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    flags: Flags,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Show which fields of replicated objects the policies of a folder read, and their size
    Fields(Box<Flags>),
}

pub(crate) enum Task {
    Serve(Config),
    Fields(Config),
}

/// All flags.
#[derive(Args, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
pub(crate) struct Flags {
    /// Read a folder of YAML or JSON manifests, watched for changes, instead of a cluster
    #[arg(long, value_name = "DIR", env = "OPA_HUB_MANIFESTS", conflicts_with = "kubeconfig")]
    manifests: Option<PathBuf>,
    /// File of Bundle documents, served next to those of the source and reloaded on change
    #[arg(long, value_name = "FILE", env = "OPA_HUB_CONFIG")]
    config: Option<PathBuf>,
    /// Kubeconfig of the API server
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Address of bundles, streams, the dashboard and metrics
    #[arg(long, value_name = "ADDR", env = "OPA_HUB_LISTEN", default_value = "127.0.0.1:8080", value_parser = listen_address)]
    listen: SocketAddr,
    /// Additional address of /health, /livez and /readyz
    #[arg(long, value_name = "ADDR", env = "OPA_HUB_HEALTH_ENDPOINT", value_parser = listen_address)]
    health_endpoint: Option<SocketAddr>,
    /// Replicas of this hub, to which agents are sent at shutdown; a name stands for all its addresses
    #[arg(long, value_name = "HOST:PORT,…", env = "OPA_HUB_REPLICAS", value_delimiter = ',', value_parser = host_port)]
    replicas: Vec<String>,
    /// Name of the bundle, as in /bundles/NAME
    #[arg(long, value_name = "NAME", env = "OPA_HUB_BUNDLE", default_value = "main")]
    bundle: String,

    /// Namespaces of policies and data; * for all, which needs the right to list ConfigMaps cluster-wide
    #[arg(
        long,
        value_name = "NS,…",
        value_delimiter = ',',
        default_value = "*",
        help_heading = "Policies and data"
    )]
    namespaces: Vec<String>,
    /// Load policies from labelled ConfigMaps
    #[arg(long, value_name = "BOOL", default_value_t = true, default_missing_value = "true", num_args = 0..=1,
          require_equals = true, action = ArgAction::Set, value_parser = boolean, help_heading = "Policies and data")]
    enable_policies: bool,
    /// Label of policy ConfigMaps
    #[arg(
        long,
        value_name = "LABEL",
        default_value = "openpolicyagent.org/policy",
        help_heading = "Policies and data"
    )]
    policy_label: String,
    /// Value of the policy label
    #[arg(long, value_name = "VALUE", default_value = "rego", help_heading = "Policies and data")]
    policy_value: String,
    /// Load JSON data from labelled ConfigMaps
    #[arg(long, value_name = "BOOL", default_value_t = true, default_missing_value = "true", num_args = 0..=1,
          require_equals = true, action = ArgAction::Set, value_parser = boolean, help_heading = "Policies and data")]
    enable_data: bool,
    /// Label of data ConfigMaps; wins over the policy label
    #[arg(
        long,
        value_name = "LABEL",
        default_value = "openpolicyagent.org/data",
        help_heading = "Policies and data"
    )]
    data_label: String,
    /// Value of the data label
    #[arg(long, value_name = "VALUE", default_value = "opa", help_heading = "Policies and data")]
    data_value: String,

    /// Replicate a namespaced resource, e.g. v1/pods or apps/v1/deployments; repeatable
    #[arg(
        long,
        value_name = "[GROUP/]VERSION/RESOURCE",
        value_delimiter = ',',
        help_heading = "Replication"
    )]
    replicate: Vec<Resource>,
    /// Replicate a cluster-scoped resource, e.g. v1/nodes; repeatable
    #[arg(
        long,
        value_name = "[GROUP/]VERSION/RESOURCE",
        value_delimiter = ',',
        help_heading = "Replication"
    )]
    replicate_cluster: Vec<Resource>,
    /// Also replicate each resource below the replication path while a policy reads it
    #[arg(long, value_name = "BOOL", default_value_t = false, default_missing_value = "true", num_args = 0..=1,
          require_equals = true, action = ArgAction::Set, value_parser = boolean, help_heading = "Replication")]
    replicate_auto: bool,
    /// Path of replicated objects: data.PATH.resource.namespace.name
    #[arg(long, value_name = "PATH", default_value = "kubernetes", help_heading = "Replication")]
    replicate_path: String,
    /// Replicated objects that a client receives, by its ?namespace= or the agent's --namespace
    #[arg(long, value_name = "SCOPE", default_value = "cluster", help_heading = "Replication")]
    replicate_scope: ReplicateScope,
    /// Served fields of replicated objects: all, auto for those that policies read, or paths such as
    /// metadata.labels,spec.containers[*].image, which also extend auto. `opa-hub fields` shows what policies read
    #[arg(
        long,
        value_name = "PATH,…",
        value_delimiter = ',',
        default_value = "all",
        help_heading = "Replication"
    )]
    fields: Vec<String>,
    /// Decisions that --fields auto analyses next to annotated entrypoints, e.g. authz/allow; without either, all rules
    #[arg(long, value_name = "PATH,…", value_delimiter = ',', help_heading = "Replication")]
    entrypoints: Vec<String>,
    /// Maximum bytes of the bundle's data, e.g. 64Mi; objects beyond are rejected
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, help_heading = "Replication")]
    max_bytes: Option<usize>,
    /// Namespaces whose objects are not replicated
    #[arg(long, value_name = "NS,…", value_delimiter = ',', help_heading = "Replication")]
    replicate_ignore_namespaces: Vec<String>,

    /// OPA that checks policies [default: opa on the PATH, or else a syntax-only parser]
    #[arg(long, value_name = "FILE", env = "OPA_BIN", help_heading = "Checking policies")]
    opa_bin: Option<PathBuf>,
    /// Check and serve policies as Rego v0
    #[arg(long, conflicts_with = "v1_compatible", help_heading = "Checking policies")]
    v0_compatible: bool,
    /// Check and serve policies as Rego v1
    #[arg(long, help_heading = "Checking policies")]
    v1_compatible: bool,
    /// Run the _test.rego keys of ConfigMaps with this label set to true, and reject those that fail
    #[arg(long, value_name = "LABEL", help_heading = "Checking policies")]
    test_label: Option<String>,
    /// Store the last good policies in this folder [default in a cluster: a ConfigMap]
    #[arg(long, value_name = "DIR", env = "OPA_HUB_STATE_DIR", help_heading = "Checking policies")]
    state_dir: Option<PathBuf>,
    /// Write verdicts to the kube-mgmt status annotation, and emit an Event for each rejection
    #[arg(long, value_name = "BOOL", default_value_t = true, default_missing_value = "true", num_args = 0..=1,
          require_equals = true, action = ArgAction::Set, value_parser = boolean, help_heading = "Checking policies")]
    write_verdicts: bool,
    /// Namespace of the Lease and the last good policies [default: the pod's, or the kubeconfig's]
    #[arg(long, value_name = "NS", env = "POD_NAMESPACE", help_heading = "Checking policies")]
    namespace: Option<String>,

    /// Log level: error, warn, info, debug or trace; RUST_LOG overrides it
    #[arg(
        long,
        value_name = "LEVEL",
        env = "OPA_HUB_LOG_LEVEL",
        default_value = "info",
        value_parser = parse_level,
        help_heading = "Logging"
    )]
    log_level: tracing::Level,
    /// Log format
    #[arg(
        long,
        value_name = "FORMAT",
        env = "OPA_HUB_LOG_FORMAT",
        default_value = "text",
        help_heading = "Logging"
    )]
    log_format: LogFormat,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum ReplicateScope {
    /// All namespaces
    Cluster,
    /// The client's namespace, and cluster-scoped objects
    Namespace,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum Error {
    #[error("--bundle {0:?} is not valid; use letters, digits, '.', '_' and '-'")]
    BundleName(String),
    #[error("--fields: {0}")]
    Fields(#[from] InvalidField),
    #[error("--fields all cannot be combined with other fields; remove one of them")]
    AllFields,
    #[error("--entrypoints {0:?} is not a decision; write package and rule, e.g. authz/allow")]
    Entrypoint(String),
    #[error("--entrypoints needs --fields auto; set both")]
    EntrypointsAlone,
    #[error(
        "--replicate-path {0:?} is not valid; write segments of letters, digits, '.', '_' and '-', separated by '/'"
    )]
    ReplicatePath(String),
    #[error("--replicate-path {0:?} is reserved for OPA or opa-hub; choose another one")]
    Reserved(String),
    #[error("{flag} {value:?} is not valid")]
    Value { flag: &'static str, value: String },
    #[error("{first} and {second} are both replicated to data.{path}; remove one of them")]
    SamePath { first: String, second: String, path: String },
}

impl Cli {
    pub(crate) fn task(&self) -> Result<Task, Error> {
        match &self.command {
            None => self.flags.config().map(Task::Serve),
            Some(Command::Fields(flags)) => flags.config().map(Task::Fields),
        }
    }

    pub(crate) fn log(&self) -> (tracing::Level, LogFormat) {
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
            validate("--namespace", namespace, is_segment)?;
        }
        if let Some(label) = &self.test_label {
            validate("--test-label", label, is_label)?;
        }
        let dialect = match (self.v0_compatible, self.v1_compatible) {
            (true, _) => Dialect::V0,
            (false, true) => Dialect::V1,
            (false, false) => Dialect::Default,
        };
        let fields = self.field_selection(&feeds)?;
        let auto = self
            .replicate_auto
            .then(|| AutoReplication { path: replicate_path.clone(), ignored: self.ignored_namespaces() });
        let scoped = self.replicate_scope == ReplicateScope::Namespace;
        let spec = BundleSpec {
            name: self.bundle.clone(),
            fields,
            scoped: scoped.then(|| NamespaceScoping { root: replicate_path, whole: BTreeSet::new() }),
            dialect,
            test_label: self.test_label.clone(),
            max_bytes: self.max_bytes,
            limits: BundleLimits::default(),
            feeds,
            auto,
        };
        let is_empty = spec.feeds.is_empty() && spec.auto.is_none();
        Ok(Config {
            source,
            listen: self.listen,
            health: self.health_endpoint,
            replicas: self.replicas.clone(),
            bundle: self.bundle.clone(),
            flags: (!is_empty).then_some(spec),
            documents: self.config.clone(),
            opa: self.opa_bin.clone(),
            state_dir: self.state_dir.clone(),
            write_verdicts: self.write_verdicts,
            namespace: self.namespace.clone(),
        })
    }

    fn field_selection(&self, feeds: &[WatchSpec]) -> Result<Selection, Error> {
        let paths = self.fields.iter().map(String::as_str).filter(|path| !matches!(*path, "all" | "auto"));
        let fields = FieldMask::parse(paths)?;
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
        let places = feeds.iter().filter_map(WatchSpec::place).filter(|_| auto).cloned().collect();
        Ok(Selection {
            given: FieldMasks::alike(if all { FieldMask::all() } else { fields }),
            follows: AutoFields { places, others: auto && self.replicate_auto },
            entrypoints,
        })
    }

    fn configmap_feeds(&self) -> Result<Vec<WatchSpec>, Error> {
        let label = |label_flag, label: &String, value_flag, value: &String| {
            validate(label_flag, label, is_label)?;
            validate(value_flag, value, is_label_value)?;
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
            contents
                .push((Content::PolicyRegistry, [policy].into_iter().chain(not_data).collect::<Vec<_>>()));
        }
        if self.enable_data {
            contents.push((Content::Data, vec![data]));
        }
        let mut scopes = Vec::new();
        for namespace in self.namespaces.iter().filter(|namespace| !namespace.is_empty()) {
            if namespace == "*" {
                scopes = vec![NamespaceSelector::AllExcept { ignored: Vec::new() }];
                break;
            }
            validate("--namespaces", namespace, is_segment)?;
            let scope = NamespaceSelector::Only(namespace.clone());
            if !scopes.contains(&scope) {
                scopes.push(scope);
            }
        }
        let feeds = contents.iter().map(|(content, labels)| configmap_feeds(content, labels, &scopes));
        Ok(feeds.flatten().collect())
    }

    fn ignored_namespaces(&self) -> Vec<String> {
        self.replicate_ignore_namespaces.iter().filter(|ns| !ns.is_empty()).cloned().collect()
    }

    fn resource_feeds(&self, path: &DirPath) -> Result<Vec<WatchSpec>, Error> {
        let ignored = self.ignored_namespaces();
        for namespace in &ignored {
            validate("--replicate-ignore-namespaces", namespace, is_segment)?;
        }
        let namespaced = self
            .replicate
            .iter()
            .map(|resource| (resource, NamespaceSelector::AllExcept { ignored: ignored.clone() }));
        let cluster =
            self.replicate_cluster.iter().map(|resource| (resource, NamespaceSelector::ClusterScoped));
        let mut feeds: Vec<WatchSpec> = Vec::new();
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
            feeds.push(WatchSpec {
                resource: resource.clone(),
                scope,
                labels: Vec::new(),
                content: Content::Resource(prefix),
            });
        }
        Ok(feeds)
    }
}

/// Accepts kube-mgmt's names too.
fn parse_level(name: &str) -> Result<tracing::Level, String> {
    let name = match name {
        "warning" => "warn",
        "fatal" | "panic" => "error",
        other => other,
    };
    name.parse().map_err(|_| "write error, warn, info, debug or trace".to_owned())
}

fn parse_bytes(text: &str) -> Result<usize, String> {
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

fn validate(flag: &'static str, value: &str, valid: impl Fn(&str) -> bool) -> Result<(), Error> {
    if valid(value) { Ok(()) } else { Err(Error::Value { flag, value: value.to_owned() }) }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn check(flags: &str, expected: &[&str]) {
        let cli = Cli::try_parse_from(["opa-hub"].into_iter().chain(flags.split_whitespace())).unwrap();
        let actual = match cli.flags.config() {
            Err(error) => vec![error.to_string()],
            Ok(config) => config
                .flags
                .iter()
                .flat_map(|spec| &spec.feeds)
                .map(|feed| format!("{feed} [{}] [{}]", feed.label_selector(), feed.field_selector()))
                .collect(),
        };
        assert_eq!(actual.len(), expected.len(), "{flags}: {actual:?}");
        for (actual, expected) in actual.iter().zip(expected) {
            assert!(actual.contains(expected), "{flags}: {actual}");
        }
    }

    #[test]
    fn flags_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn kube_mgmt_flags_select_watches() {
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
    fn contradicting_flags_are_rejected() {
        check(
            "--replicate v1/events --replicate events.k8s.io/v1/events",
            &["are both replicated to data.kubernetes.events"],
        );
        check("--replicate v1/pods --replicate-cluster v1/pods", &["are both replicated"]);
        check("--fields auto,all", &["cannot be combined"]);
        check("--bundle a/b", &["--bundle"]);
        check("--replicate-path a//b", &["--replicate-path"]);
        check("--replicate-path system/a", &["choose another one"]);
        check("--policy-value a,b", &["--policy-value"]);
        check("--fields metadata.labels,a..b", &["--fields: \"a..b\""]);
    }
}

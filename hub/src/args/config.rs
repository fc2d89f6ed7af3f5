//! Validated configuration of the hub.

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::spec::BundleSpec;

/// Validated configuration of the hub.
#[derive(Debug, Clone)]
pub struct Config {
    /// Source of objects.
    pub source: Source,
    /// Address of the API.
    pub listen: SocketAddr,
    /// Additional address for health endpoints.
    pub health: Option<SocketAddr>,
    /// Peers as `HOST:PORT`, named to clients at shutdown.
    pub replicas: Vec<String>,
    /// Name of the flags' bundle and of the Lease.
    pub bundle: String,
    /// Bundle configured by flags. `None` with documents only.
    pub flags: Option<BundleSpec>,
    /// File of bundle documents.
    pub documents: Option<PathBuf>,
    /// OPA binary. `None` selects `opa` on the search path.
    pub opa: Option<PathBuf>,
    /// Folder for last good policies. `None` selects the cluster, if any.
    pub state_dir: Option<PathBuf>,
    /// Whether verdicts are written to the cluster's ConfigMaps.
    pub write_verdicts: bool,
    /// Namespace of the hub. `None` selects that of the pod or kubeconfig.
    pub namespace: Option<String>,
}

/// Source of objects.
#[derive(Debug, Clone)]
pub enum Source {
    /// Kubernetes API server.
    Kubernetes {
        /// `--kubeconfig`. `None` selects the environment, then the pod's cluster.
        kubeconfig: Option<PathBuf>,
    },
    /// Folder of manifests.
    Folder(PathBuf),
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Kubernetes { kubeconfig: Some(path) } => write!(f, "kubeconfig {}", path.display()),
            Self::Kubernetes { kubeconfig: None } => f.write_str("cluster of the environment"),
            Self::Folder(dir) => write!(f, "folder {}", dir.display()),
        }
    }
}

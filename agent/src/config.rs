//! Configuration of the agent.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use reqwest::Url;

/// Configuration of the agent.
#[derive(Clone)]
pub struct Config {
    /// Equivalent hubs.
    pub hubs: Vec<Url>,
    /// CA certificates for https hubs.
    pub hub_ca_file: Option<PathBuf>,
    /// Bundle to sync.
    pub bundle: String,
    /// `None` if the bundle is not scoped.
    pub namespace: Option<String>,
    /// Connection to OPA.
    pub opa: OpaConfig,
    /// Delivery of policies.
    pub delivery: Delivery,
    /// Address of health and policy bundle.
    pub listen: SocketAddr,
    /// Additional address of health.
    pub health: Option<SocketAddr>,
    /// `None` if nothing is stored.
    pub state_dir: Option<PathBuf>,
    /// Time out of sync until `/readyz` fails; `None` if never.
    pub unready_after: Option<Duration>,
}

/// Connection to OPA.
#[derive(Clone)]
pub struct OpaConfig {
    /// OPA's API, ending in `/v1/`.
    pub url: Url,
    /// Bearer token.
    pub token: Option<Token>,
    /// CA certificates.
    pub ca_file: Option<PathBuf>,
    /// Whether to accept any certificate.
    pub allow_insecure: bool,
}

/// Bearer token.
#[derive(Clone)]
pub enum Token {
    /// From the command line.
    Text(String),
    /// First line of a file, read for every request.
    File(PathBuf),
}

/// Delivery of policies to OPA.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Delivery {
    /// One PUT per module; OPA needs no configuration
    Rest,
    /// A bundle that OPA loads from the agent
    Bundle,
}

//! Real components as child processes.

pub mod assets;

pub mod process;

pub mod certificates;

pub mod etcd;

pub mod apiserver;

mod external_cluster;

pub mod opa;

pub mod hub;

pub mod agent;

pub mod blackhole_proxy;

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use anyhow::Context as _;

pub use self::agent::{Agent, Delivery};
pub use self::apiserver::ControlPlane;
pub use self::hub::Hub;
pub use self::opa::Opa;

/// Installs the rustls provider, which every client of the API server needs.
pub fn init() {
    _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

/// HTTP client for loopback.
pub fn http() -> anyhow::Result<reqwest::Client> {
    init();
    Ok(reqwest::Client::builder().no_proxy().build()?)
}

/// An unused loopback port, never returned twice. Ephemeral ports are avoided: the kernel could assign one before the
/// caller listens.
pub fn free_port() -> anyhow::Result<u16> {
    static RESERVED: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    const PORTS: Range<u16> = 10_000..32_000;
    const TRIES: usize = 10_000;
    let mut reserved = RESERVED.lock().unwrap_or_else(PoisonError::into_inner);
    let mut ports = std::iter::repeat_with(|| fastrand::u16(PORTS)).take(TRIES);
    let is_free = |port: &u16| !reserved.contains(port) && TcpListener::bind(("127.0.0.1", *port)).is_ok();
    let port = ports.find(is_free).context("finding a free port failed")?;
    reserved.insert(port);
    Ok(port)
}

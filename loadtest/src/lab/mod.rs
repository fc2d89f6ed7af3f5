//! Real components as child processes, each with a folder and a log, each gone when its value is dropped.

pub mod assets;

pub mod process;

pub mod certificates;

pub mod etcd;

pub mod apiserver;

mod given;

pub mod opa;

pub mod hub;

pub mod agent;

pub mod valve;

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use anyhow::Context as _;

pub use self::agent::{Agent, Delivery};
pub use self::apiserver::ControlPlane;
pub use self::hub::Hub;
pub use self::opa::Opa;

/// Makes rustls usable; every program and test that talks to the API server calls it first.
pub fn init() {
    // A second call finds the provider installed.
    _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

/// A client for what listens on loopback.
pub fn http() -> anyhow::Result<reqwest::Client> {
    init();
    Ok(reqwest::Client::builder().no_proxy().build()?)
}

/// A loopback port that nobody listens on, and that nobody was given before: between this and whoever listens there, the
/// kernel would give it again. It is none of those that connections come from.
pub fn free_port() -> anyhow::Result<u16> {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    const PORTS: Range<u16> = 10_000..32_000;
    const TRIES: usize = 10_000;
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut ports = std::iter::repeat_with(|| fastrand::u16(PORTS)).take(TRIES);
    let free = |port: &u16| !given.contains(port) && TcpListener::bind(("127.0.0.1", *port)).is_ok();
    let port = ports.find(free).context("no port is free")?;
    given.insert(port);
    Ok(port)
}

//! Real components as child processes, each with a folder and a log, each gone when its value is dropped.

pub mod assets;

pub mod process;

pub mod etcd;

pub mod apiserver;

pub mod opa;

pub mod hub;

pub mod agent;

pub mod cut;

pub mod valve;

use std::net::TcpListener;

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

/// A loopback port that nobody listens on.
pub fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

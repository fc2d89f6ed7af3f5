//! Command line; flags for OPA are kube-mgmt's.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, CommandFactory as _, Parser};
use opa_hub_proto::flag::{boolean, listen_address};
use opa_hub_proto::path::is_segment;
use reqwest::Url;

use crate::config::{Config, Delivery, OpaConfig, Token};

/// Keep the OPA next to this agent in sync with opa-hub.
///
/// The agent writes data by OPA's REST API. With --policy-delivery bundle OPA loads policies from the agent:
///
///   services: {agent: {url: "http://127.0.0.1:8282"}}
///   bundles:
///     main: {service: agent, resource: bundles/main, polling: {long_polling_timeout_seconds: 30}}
///     data: {service: agent, resource: bundles/main/data-only, polling: {long_polling_timeout_seconds: 30}}
#[derive(Parser, Debug)]
#[command(version, name = "opa-hub-agent", verbatim_doc_comment, args_override_self = true)]
pub(crate) struct Args {
    /// Hub URLs, several for failover
    #[arg(long, value_name = "URL,…", env = "OPA_HUB_URL", value_delimiter = ',', required = true)]
    hub: Vec<Url>,
    /// Bundle to sync
    #[arg(long, value_name = "NAME", env = "OPA_HUB_BUNDLE", default_value = "main")]
    bundle: String,
    /// Namespace of the requested objects, if the hub scopes by namespace
    #[arg(long, value_name = "NS", env = "OPA_HUB_NAMESPACE")]
    namespace: Option<String>,
    /// Delivery of policies. Use bundle if packages and replicated data share their first name: with rest OPA copies
    /// that data at every change
    #[arg(long, value_name = "HOW", env = "OPA_HUB_POLICY_DELIVERY", default_value = "rest")]
    policy_delivery: Delivery,
    /// Address of health and policy bundle
    #[arg(long, value_name = "ADDR", env = "OPA_HUB_AGENT_LISTEN", default_value = "127.0.0.1:8282", value_parser = listen_address)]
    listen: SocketAddr,
    /// Additional address of /health, /livez, /readyz and /metrics
    #[arg(long, value_name = "ADDR", env = "OPA_HUB_HEALTH_ENDPOINT", value_parser = listen_address)]
    health_endpoint: Option<SocketAddr>,
    /// PEM file of additional authorities for hubs, read once
    #[arg(long, value_name = "FILE", env = "OPA_HUB_CA_FILE")]
    hub_ca_file: Option<PathBuf>,
    /// Directory of the last good data and policies, for restarts without a hub; an emptyDir suffices
    #[arg(long, value_name = "DIR", env = "OPA_HUB_STATE_DIR")]
    state_dir: Option<PathBuf>,
    /// Seconds out of sync after which /readyz fails. Without this flag a loaded OPA stays ready while no hub answers
    #[arg(long, value_name = "SECONDS", env = "OPA_HUB_UNREADY_AFTER")]
    unready_after: Option<u64>,

    /// URL of OPA's API
    #[arg(
        long,
        value_name = "URL",
        env = "OPA_URL",
        default_value = "http://127.0.0.1:8181/v1",
        help_heading = "OPA"
    )]
    opa_url: Url,
    /// Bearer token for OPA
    #[arg(
        long,
        value_name = "TOKEN",
        env = "OPA_AUTH_TOKEN",
        hide_env_values = true,
        conflicts_with = "opa_auth_token_file",
        help_heading = "OPA"
    )]
    opa_auth_token: Option<String>,
    /// File with the bearer token, read for every request
    #[arg(long, value_name = "FILE", env = "OPA_AUTH_TOKEN_FILE", help_heading = "OPA")]
    opa_auth_token_file: Option<PathBuf>,
    /// PEM file of additional authorities for OPA, read once
    #[arg(long, value_name = "FILE", env = "OPA_CA_FILE", help_heading = "OPA")]
    opa_ca_file: Option<PathBuf>,
    /// Accept any certificate of OPA
    #[arg(long, value_name = "BOOL", env = "OPA_ALLOW_INSECURE", default_value_t = false, num_args = 0..=1,
          default_missing_value = "true", require_equals = true, action = ArgAction::Set, value_parser = boolean, help_heading = "OPA")]
    opa_allow_insecure: bool,

    /// Log level: error, warn, info, debug or trace
    #[arg(
        long,
        value_name = "LEVEL",
        env = "OPA_HUB_LOG_LEVEL",
        default_value = "info",
        value_parser = level,
        help_heading = "Logging"
    )]
    pub(crate) log_level: tracing::Level,
    /// Write JSON logs
    #[arg(long, env = "OPA_HUB_LOG_JSON", help_heading = "Logging")]
    pub(crate) log_json: bool,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum Error {
    #[error("--bundle {0:?}: use letters, digits, '.', '_' and '-'")]
    BundleName(String),
    #[error("--opa-ca-file and --opa-allow-insecure conflict; set one of them")]
    CaUnused,
    /// Logs would show passwords.
    #[error("{flag}: write a URL without user and password")]
    UserInfo { flag: &'static str },
    #[error("--opa-url {0}: write the URL of OPA's API, which ends in /v1")]
    OpaUrl(String),
    #[error("{flag} {url}: write http://HOST[:PORT] or https://HOST[:PORT]")]
    Url { flag: &'static str, url: String },
}

impl Args {
    /// Returns unknown flags too: containers that ran kube-mgmt may have flags of the hub.
    pub(crate) fn parse_tolerantly(
        args: impl IntoIterator<Item = String>,
    ) -> Result<(Self, Vec<String>), clap::Error> {
        let command = Self::command();
        let is_known = |name: &str| {
            matches!(name, "help" | "version")
                || command.get_arguments().any(|arg| arg.get_long() == Some(name))
        };
        let (mut known, mut unknown) = (Vec::new(), Vec::new());
        let mut args = args.into_iter().peekable();
        while let Some(arg) = args.next() {
            let name = arg.strip_prefix("--").and_then(|flag| flag.split('=').next());
            if name.is_none_or(|name| name.is_empty() || is_known(name)) {
                known.push(arg);
                continue;
            }
            // A separate value, which may be a secret.
            if !arg.contains('=') {
                args.next_if(|next| !next.starts_with('-'));
            }
            unknown.push(arg.split('=').next().unwrap_or_default().to_owned());
        }
        Ok((Self::try_parse_from(known)?, unknown))
    }

    pub(crate) fn config(&self) -> Result<Config, Error> {
        if !is_segment(&self.bundle) {
            return Err(Error::BundleName(self.bundle.clone()));
        }
        if self.opa_allow_insecure && self.opa_ca_file.is_some() {
            return Err(Error::CaUnused);
        }
        let hubs = self.hub.iter().map(|url| base_url("--hub", url)).collect::<Result<_, _>>()?;
        let opa_url = base_url("--opa-url", &self.opa_url)?;
        if !opa_url.path().ends_with("/v1/") {
            return Err(Error::OpaUrl(self.opa_url.to_string()));
        }
        let file = self.opa_auth_token_file.clone().map(Token::File);
        Ok(Config {
            hubs,
            hub_ca_file: self.hub_ca_file.clone(),
            bundle: self.bundle.clone(),
            namespace: self.namespace.clone().filter(|namespace| !namespace.is_empty()),
            opa: OpaConfig {
                url: opa_url,
                token: self.opa_auth_token.clone().map(Token::Text).or(file),
                ca_file: self.opa_ca_file.clone(),
                allow_insecure: self.opa_allow_insecure,
            },
            delivery: self.policy_delivery,
            listen: self.listen,
            health: self.health_endpoint,
            state_dir: self.state_dir.clone(),
            unready_after: self.unready_after.map(Duration::from_secs),
        })
    }
}

fn level(name: &str) -> Result<tracing::Level, String> {
    let name = match name {
        "warning" => "warn",
        "fatal" | "panic" => "error",
        other => other,
    };
    name.parse().map_err(|_| "write error, warn, info, debug or trace".to_owned())
}

/// Appends `/` for relative paths.
fn base_url(flag: &'static str, url: &Url) -> Result<Url, Error> {
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(Error::Url { flag, url: url.to_string() });
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(Error::UserInfo { flag });
    }
    let mut url = url.clone();
    if !url.path().ends_with('/') {
        url.set_path(&format!("{}/", url.path()));
    }
    Ok(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(flags: &str) -> Result<Config, Error> {
        let flags = ["opa-hub-agent"].into_iter().chain(flags.split_whitespace());
        Args::try_parse_from(flags).unwrap().config()
    }

    #[test]
    fn flags_are_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn unknown_flags_are_ignored() {
        let args = "opa-hub-agent --replicate v1/pods --hub http://a --enable-data --policies=x --log-level warning \
                    --opa-allow-insecure=true --require-policy-label";
        let (args, unknown) = Args::parse_tolerantly(args.split_whitespace().map(str::to_owned)).unwrap();
        assert_eq!(unknown, ["--replicate", "--enable-data", "--policies", "--require-policy-label"]);
        assert_eq!((args.opa_allow_insecure, args.log_level), (true, tracing::Level::WARN));
        let secret = "opa-hub-agent --hub http://a --opa-token=secret --opa-auth-tokne secret";
        let (_, unknown) = Args::parse_tolerantly(secret.split_whitespace().map(str::to_owned)).unwrap();
        assert_eq!(unknown, ["--opa-token", "--opa-auth-tokne"], "values may be secrets");
        let missing = Args::parse_tolerantly(["opa-hub-agent".to_owned(), "--replicate".to_owned()]);
        assert!(missing.unwrap_err().to_string().contains("--hub"));
    }

    #[test]
    fn flags_are_spelled_as_for_kube_mgmt() {
        for flags in [
            "--opa-allow-insecure=1",
            "--opa-allow-insecure=T",
            "--opa-allow-insecure",
            "--opa-allow-insecure=0 --opa-allow-insecure",
        ] {
            assert!(config(&format!("--hub http://a {flags}")).unwrap().opa.allow_insecure, "{flags}");
        }
        for (flag, expected) in [("localhost:8000", "127.0.0.1:8000"), (":8000", "0.0.0.0:8000")] {
            let config = config(&format!("--hub http://a --health-endpoint={flag}")).unwrap();
            assert_eq!(config.health, Some(expected.parse().unwrap()));
        }
    }

    #[test]
    fn urls_and_names() {
        let config = config("--hub http://a:1,https://b/x --opa-url http://127.0.0.1:8181/v1").unwrap();
        assert_eq!(config.hubs.iter().map(Url::as_str).collect::<Vec<_>>(), ["http://a:1/", "https://b/x/"]);
        assert_eq!(config.opa.url.as_str(), "http://127.0.0.1:8181/v1/");
        assert!(matches!(super::tests::config("--hub unix:/x"), Err(Error::Url { .. })));
        assert!(matches!(super::tests::config("--hub http://a --bundle a/b"), Err(Error::BundleName(_))));
        let error = super::tests::config("--hub http://me:secret@a").err().unwrap();
        assert!(matches!(error, Error::UserInfo { .. }) && !error.to_string().contains("secret"));
        for url in ["http://a:8181", "http://a:8181/v1/data"] {
            let found = super::tests::config(&format!("--hub http://a --opa-url {url}"));
            assert!(matches!(found, Err(Error::OpaUrl(_))), "{url}");
        }
    }
}

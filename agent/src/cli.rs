//! The command line: where the hub is, and kube-mgmt's flags for where OPA is.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, CommandFactory as _, Parser};
use opa_hub_proto::flag::{boolean, listen_address};
use opa_hub_proto::path::is_segment;
use reqwest::Url;

use crate::config::{Config, Delivery, OpaConfig, Token};

/// opa-hub-agent keeps the OPA beside it in step with opa-hub. It needs no Kubernetes permission.
///
/// Data goes to OPA by its REST API. Policies go the same way (--policy-delivery rest), or as a bundle that OPA loads
/// from the agent (--policy-delivery bundle), for which OPA is configured so:
///
///   services: {agent: {url: "http://127.0.0.1:8282"}}
///   bundles:
///     main: {service: agent, resource: bundles/main, polling: {long_polling_timeout_seconds: 30}}
///     data: {service: agent, resource: bundles/main/data-only, polling: {long_polling_timeout_seconds: 30}}
#[derive(Parser, Debug)]
#[command(version, name = "opa-hub-agent", verbatim_doc_comment, args_override_self = true)]
pub struct Cli {
    /// The hub; several, separated by commas, when there are replicas to fail over to
    #[arg(long, value_name = "URL,…", env = "OPA_HUB_URL", value_delimiter = ',', required = true)]
    hub: Vec<Url>,
    /// The bundle to keep
    #[arg(long, value_name = "NAME", env = "OPA_HUB_BUNDLE", default_value = "main")]
    bundle: String,
    /// The namespace whose objects are wanted, where the hub gives them out by namespace
    #[arg(long, value_name = "NS", env = "OPA_HUB_NAMESPACE")]
    namespace: Option<String>,
    /// How policies reach OPA. Where a package shares its first name with replicated data (kubernetes.admission beside
    /// data.kubernetes), rest makes OPA copy that data at every change: give bundle
    #[arg(long, value_name = "HOW", env = "OPA_HUB_POLICY_DELIVERY", default_value = "rest")]
    policy_delivery: Delivery,
    /// Serve health, and with --policy-delivery bundle the policies, here
    #[arg(long, value_name = "ADDR", env = "OPA_HUB_AGENT_LISTEN", default_value = "127.0.0.1:8282", value_parser = listen_address)]
    listen: SocketAddr,
    /// Serve /health, /livez, /readyz and /metrics here too
    #[arg(long, value_name = "ADDR", env = "OPA_HUB_HEALTH_ENDPOINT", value_parser = listen_address)]
    health_endpoint: Option<SocketAddr>,
    /// The authority that signed the certificates of https hubs, as PEM, besides those of the system. It is read once
    #[arg(long, value_name = "FILE", env = "OPA_HUB_CA_FILE")]
    hub_ca_file: Option<PathBuf>,
    /// Keep the last good data and policies in this directory, so that OPA and agent restart without a hub. A volume that
    /// lasts as long as the pod will do
    #[arg(long, value_name = "DIR", env = "OPA_HUB_STATE_DIR")]
    state_dir: Option<PathBuf>,
    /// Fail /readyz once OPA is out of step with its hub for so many seconds. Without this an OPA that was loaded stays
    /// ready while no hub answers: an outage of the hub takes no application out of its Service
    #[arg(long, value_name = "SECONDS", env = "OPA_HUB_UNREADY_AFTER")]
    unready_after: Option<u64>,

    /// OPA's API
    #[arg(
        long,
        value_name = "URL",
        env = "OPA_URL",
        default_value = "http://127.0.0.1:8181/v1",
        help_heading = "OPA"
    )]
    opa_url: Url,
    /// The bearer token that OPA wants
    #[arg(
        long,
        value_name = "TOKEN",
        env = "OPA_AUTH_TOKEN",
        hide_env_values = true,
        conflicts_with = "opa_auth_token_file",
        help_heading = "OPA"
    )]
    opa_auth_token: Option<String>,
    /// A file whose first line is the bearer token; it may change
    #[arg(long, value_name = "FILE", env = "OPA_AUTH_TOKEN_FILE", help_heading = "OPA")]
    opa_auth_token_file: Option<PathBuf>,
    /// The authority that signed OPA's certificate, as PEM, besides those of the system. It is read once
    #[arg(long, value_name = "FILE", env = "OPA_CA_FILE", help_heading = "OPA")]
    opa_ca_file: Option<PathBuf>,
    /// Take whatever certificate OPA shows
    #[arg(long, value_name = "BOOL", env = "OPA_ALLOW_INSECURE", default_value_t = false, num_args = 0..=1,
          default_missing_value = "true", require_equals = true, action = ArgAction::Set, value_parser = boolean, help_heading = "OPA")]
    opa_allow_insecure: bool,

    /// What is logged: error, warn, info, debug, trace
    #[arg(
        long,
        value_name = "LEVEL",
        env = "OPA_HUB_LOG_LEVEL",
        default_value = "info",
        value_parser = level,
        help_heading = "Logging"
    )]
    pub(crate) log_level: tracing::Level,
    /// Log one JSON object a line
    #[arg(long, env = "OPA_HUB_LOG_JSON", help_heading = "Logging")]
    pub(crate) log_json: bool,
}

/// Flags that parse one by one and make no sense.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// A bundle's name goes into URLs and paths.
    #[error("--bundle {0:?}: use letters, digits, '.', '_' and '-'")]
    BundleName(String),
    /// One of them would be for nothing.
    #[error("--opa-ca-file and --opa-allow-insecure cannot be used together: give only one of them")]
    CaUnused,
    /// A URL with a user: it would be in logs.
    #[error("{flag}: write a URL without user and password")]
    UserInfo {
        /// The flag.
        flag: &'static str,
    },
    /// A URL of OPA that is not its API's.
    #[error("--opa-url {0}: write the URL of OPA's API, which ends in /v1")]
    OpaUrl(String),
    /// A URL that is no place to send requests to.
    #[error("{flag} {url}: write http://HOST[:PORT] or https://HOST[:PORT]")]
    Url {
        /// The flag.
        flag: &'static str,
        /// What it was given.
        url: String,
    },
}

impl Cli {
    /// The command line, without what it has of flags that are none of ours: kube-mgmt takes those too, and a container
    /// that was kube-mgmt's may still be given what only the hub needs now. They are told.
    pub fn parse_tolerantly(
        args: impl IntoIterator<Item = String>,
    ) -> Result<(Self, Vec<String>), clap::Error> {
        let command = Self::command();
        let is_ours = |name: &str| {
            matches!(name, "help" | "version")
                || command.get_arguments().any(|arg| arg.get_long() == Some(name))
        };
        let (mut ours, mut others) = (Vec::new(), Vec::new());
        let mut args = args.into_iter().peekable();
        while let Some(arg) = args.next() {
            let name = arg.strip_prefix("--").and_then(|flag| flag.split('=').next());
            if name.is_none_or(|name| name.is_empty() || is_ours(name)) {
                ours.push(arg);
                continue;
            }
            // A value in an argument of its own, as kube-mgmt's parser takes it. It may be a token, and is not told.
            if !arg.contains('=') {
                args.next_if(|next| !next.starts_with('-'));
            }
            others.push(arg.split('=').next().unwrap_or_default().to_owned());
        }
        Ok((Self::try_parse_from(ours)?, others))
    }

    /// What the flags mean.
    pub fn config(&self) -> Result<Config, Error> {
        if !is_segment(&self.bundle) {
            return Err(Error::BundleName(self.bundle.clone()));
        }
        if self.opa_allow_insecure && self.opa_ca_file.is_some() {
            return Err(Error::CaUnused);
        }
        let hubs = self.hub.iter().map(|url| folder("--hub", url)).collect::<Result<_, _>>()?;
        let opa_url = folder("--opa-url", &self.opa_url)?;
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

/// A level by its name here or in kube-mgmt.
fn level(name: &str) -> Result<tracing::Level, String> {
    let name = match name {
        "warning" => "warn",
        "fatal" | "panic" => "error",
        other => other,
    };
    name.parse().map_err(|_| "write error, warn, info, debug or trace".to_owned())
}

/// `url` such that relative paths go below it.
fn folder(flag: &'static str, url: &Url) -> Result<Url, Error> {
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
        Cli::try_parse_from(flags).unwrap().config()
    }

    #[test]
    fn flags_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_only_the_hub_needs_now_is_passed_over() {
        let args = "opa-hub-agent --replicate v1/pods --hub http://a --enable-data --policies=x --log-level warning \
                    --opa-allow-insecure=true --require-policy-label";
        let (cli, others) = Cli::parse_tolerantly(args.split_whitespace().map(str::to_owned)).unwrap();
        assert_eq!(others, ["--replicate", "--enable-data", "--policies", "--require-policy-label"]);
        assert_eq!((cli.opa_allow_insecure, cli.log_level), (true, tracing::Level::WARN));
        let secret = "opa-hub-agent --hub http://a --opa-token=secret --opa-auth-tokne secret";
        let (_, others) = Cli::parse_tolerantly(secret.split_whitespace().map(str::to_owned)).unwrap();
        assert_eq!(others, ["--opa-token", "--opa-auth-tokne"], "values may be secrets");
        let missing = Cli::parse_tolerantly(["opa-hub-agent".to_owned(), "--replicate".to_owned()]);
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

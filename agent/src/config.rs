//! Every bound of the agent, each with its unit and its reason, and what the command line is turned into.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use reqwest::Url;

/// Maximum bytes of one PATCH of an archive, and of a frame that takes several: what OPA decodes at once, and what the
/// agent holds. An operation that is larger is a PATCH of its own.
pub const PATCH_BYTES_MAX: usize = 256 << 10;
/// Maximum bytes of the operations of a frame that is one PATCH, so that decisions see all of it or nothing. The agent
/// holds them three times.
pub const FRAME_PATCH_BYTES_MAX: usize = 1 << 20;
/// Interval between two looks at directories in OPA, one directory a look: others may have removed it. A look costs OPA
/// as much as a poll, and 1,000 directories are looked at in 84 minutes.
pub const VERIFY_INTERVAL: Duration = Duration::from_secs(5);
/// Bytes of a policy bundle that the agent holds for its OPA.
pub const POLICY_BUNDLE_BYTES_MAX: usize = 16 << 20;
/// Pieces of an archive that are decoded ahead of OPA.
pub const DECODED_AHEAD_MAX: usize = 2;
/// Interval of the question whether OPA still holds what it was given: a restart of OPA is noticed within this time.
pub const OPA_POLL: Duration = Duration::from_millis(500);
/// OPA activates a policy bundle within about this time; until then nothing goes that older policies read.
pub const ACTIVATION_MAX: Duration = Duration::from_secs(2);
/// A request that writes to OPA: a directory of thousands of entries takes OPA a second.
pub const OPA_WRITE: Duration = Duration::from_secs(60);
/// A request that reads the marker from OPA.
pub const OPA_READ: Duration = Duration::from_secs(5);
/// A request to the hub must be answered by its first bytes in this time: compressing 150 MB takes it half a second.
pub const HUB_ANSWER: Duration = Duration::from_secs(10);
/// The hub sends something every 5 s: a stream that is silent for this long is dead.
pub const STREAM_SILENCE: Duration = Duration::from_secs(15);
/// Time in which a body of the hub must bring [`BODY_BYTES_MIN`]; time that its reader takes does not count.
pub const BODY_WINDOW: Duration = Duration::from_secs(10);
/// Minimum bytes of a body in one [`BODY_WINDOW`]: a thousandth of what any network within a cluster carries. A hub that
/// is slower is left for another one.
pub const BODY_BYTES_MIN: usize = 64 << 10;
/// Maximum time from the first bytes of an event to its end: an event has 4 MiB at most.
pub const EVENT_MAX: Duration = Duration::from_secs(30);
/// Maximum time that a hub may announce an event without sending one. Another one may be quicker.
pub const WAIT_MAX: Duration = Duration::from_secs(60);
/// Maximum number of final refusals of a reconcile request in a row. Then OPA is loaded anew: each hub of two may refuse
/// one while it is replaced.
pub const REFUSALS_MAX: u32 = 3;
/// Pause between two repairs of an OPA that does not activate its policies. The policies that it has need newer data, and
/// each repair costs the hub an answer of its own.
pub const UNACTIVATED_PAUSE: Duration = Duration::from_secs(5);
/// Maximum number of threads that resolve names. An outage of DNS blocks one for up to 30 s for each try of a hub, and
/// OPA's name must be resolved beside them.
pub const RESOLVERS_MAX: usize = 8;
/// Maximum time for the last sync of the state at the end: a kubelet waits 30 s before it kills.
pub const CLOSE_MAX: Duration = Duration::from_secs(5);
/// While no hub is as new as what OPA holds, OPA keeps that for this long. Then the source itself went back, as a
/// cluster does that is restored from a backup.
pub const LAG_MAX: Duration = Duration::from_secs(60);
/// While the hub that is followed is cut off from its source, another is looked for after a pause of this …
pub const FRESH_LOOK: Duration = Duration::from_secs(5);
/// … doubled up to this …
pub const FRESH_LOOK_MAX: Duration = Duration::from_secs(60);
/// … and must answer in this time.
pub const FRESH_ANSWER: Duration = Duration::from_secs(1);
/// Pauses between tries are drawn from nothing up to this, doubled at every failure …
pub const RETRY_FIRST: Duration = Duration::from_millis(100);
/// … up to this, so that ten thousand agents come back spread over seconds.
pub const RETRY_MAX: Duration = Duration::from_secs(5);
/// Maximum time in which a poll by an OPA without policies is kept waiting for its data, where OPA grants no longer one:
/// OPA waits 10 s for an answer (OPA v1/plugins/rest/rest.go, `defaultResponseHeaderTimeoutSeconds`).
pub const GATE_MAX: Duration = Duration::from_secs(5);
/// Maximum bytes of an answer of OPA: a marker of 20,000 directories, or the keys of the largest one.
pub const ANSWER_BYTES_MAX: usize = 16 << 20;
/// Time in which a hub must begin to answer an agent that has a last good state. Then OPA begins with that.
pub const HUB_FIRST: Duration = Duration::from_millis(300);
/// Maximum number of connections to one of the agent's listeners: OPA, a kubelet and a few scrapers. Beyond, the kernel's
/// queue holds them.
pub const CONNECTIONS_MAX: usize = 64;
/// Maximum time for the head of a request, also between two requests: a client that sends none makes room for a probe
/// within this time.
pub const REQUEST_HEAD_MAX: Duration = Duration::from_secs(5);
/// Maximum time in which written bytes are acknowledged. It ends a connection of a client that does not read.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(20);
/// Pause after a connection could not be accepted: file descriptors are freed by what ends.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// The longest long poll that is granted to OPA.
pub const LONG_POLL_MAX: Duration = Duration::from_secs(300);

/// What the agent was told to do.
#[derive(Clone)]
pub struct Config {
    /// Hubs, each as good as the other.
    pub hubs: Vec<Url>,
    /// The authority that signed the certificates of https hubs.
    pub hub_ca_file: Option<PathBuf>,
    /// The bundle to keep.
    pub bundle: String,
    /// Whose objects are wanted.
    pub namespace: Option<String>,
    /// OPA's API, ending in `/v1/`.
    pub opa: OpaConfig,
    /// How modules reach OPA.
    pub delivery: Delivery,
    /// Where health and the policy bundle are served.
    pub listen: SocketAddr,
    /// Where health is served besides.
    pub health: Option<SocketAddr>,
    /// Directory of the last good state; `None`: it is not kept.
    pub state_dir: Option<PathBuf>,
    /// Time for which OPA may be out of step before `/readyz` fails; `None`: for ever.
    pub unready_after: Option<Duration>,
}

/// How OPA is reached.
#[derive(Clone)]
pub struct OpaConfig {
    /// Its API, ending in `/v1/`.
    pub url: Url,
    /// What it wants to see.
    pub token: Option<Token>,
    /// The authority that signed its certificate.
    pub ca_file: Option<PathBuf>,
    /// Whether any certificate will do.
    pub allow_insecure: bool,
}

/// A bearer token.
#[derive(Clone)]
pub enum Token {
    /// Given on the command line.
    Text(String),
    /// The first line of a file, read for every request, since it may be renewed.
    File(PathBuf),
}

/// How modules reach OPA.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Delivery {
    /// One PUT a module, under kube-mgmt's ids; OPA needs no configuration
    Rest,
    /// A bundle that OPA loads from the agent: all modules at once, in no order
    Bundle,
}

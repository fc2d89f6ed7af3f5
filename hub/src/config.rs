//! Shared limits of the hub, and its validated configuration.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::bundle::spec::Spec;

/// Maximum number of events queued between source and store. A full queue holds back the watch.
pub const EVENT_QUEUE_MAX: usize = 1024;
/// Maximum number of events in one commit. Bounds the delay to about 50 ms under load.
pub const COMMIT_EVENTS_MAX: usize = 4096;

/// Limits of one bundle. Tests lower them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BundleLimits {
    /// Maximum number of commits in the history: at 10 ms a commit, agents may resume for 40 s.
    pub log_commits_max: usize,
    /// Maximum number of keys in the history: about 10 MB.
    pub log_keys_max: usize,
    /// Maximum bytes of edits in the history.
    pub log_edit_bytes_max: usize,
    /// Maximum number of events in one commit.
    pub commit_events_max: usize,
    /// Maximum number of directories in a snapshot. Every archive header contains their digests (8 MiB).
    pub directories_max: usize,
}

impl Default for BundleLimits {
    fn default() -> Self {
        Self {
            log_commits_max: 4096,
            log_keys_max: 1 << 16,
            log_edit_bytes_max: 8 << 20,
            commit_events_max: COMMIT_EVENTS_MAX,
            directories_max: 20_000,
        }
    }
}

/// Interval of stream heartbeats, for proxies and for agents that detect a lost hub.
pub const HEARTBEAT: Duration = Duration::from_secs(5);
/// Maximum duration of a long poll. OPA asks for at most 30 s by default.
pub const LONG_POLL_MAX: Duration = Duration::from_secs(300);
/// Minimum interval between bundle archives. Each makes OPA parse all modules and data.
pub const SNAPSHOT_INTERVAL: Duration = Duration::from_secs(1);
/// Minimum JSON bytes of a compressed segment. Below it, deflate's output grows by over 5 %.
pub const SEGMENT_BYTES_MIN: usize = 64 << 10;
/// JSON bytes after which a segment ends at the next chunk. One change compresses as much.
pub const SEGMENT_BYTES_MAX: usize = 1 << 20;
/// Maximum number of clients remembered for a failed native delta.
pub const DELTA_CLIENTS_MAX: usize = 4096;
/// Maximum number of cached reconcile responses of one bundle.
pub const RECONCILE_CACHE_MAX: usize = 1024;
/// Maximum bytes of these cached responses. The newest is cached at any size.
pub const RECONCILE_CACHE_BYTES_MAX: usize = 64 << 20;
/// Maximum bytes of cached or unsent reconcile responses of one bundle. Above it none is encoded.
pub const RECONCILE_LIVE_MAX: usize = 128 << 20;
/// Maximum number of concurrent reconcile encodes of one bundle. Each uses a core.
pub const RECONCILE_ENCODES_MAX: usize = 1;
/// Maximum bytes of pending reconcile requests of one bundle: 280 clients with 3,000 directories.
pub const RECONCILE_REQUESTS_MAX: usize = 64 << 20;
/// Minimum charge of a reconcile request in bytes: at most 4,096 wait.
pub const RECONCILE_REQUEST_MIN: usize = 16 << 10;
/// Maximum bytes of a manifest file.
pub const MANIFEST_BYTES_MAX: u64 = 512 << 20;
/// Maximum depth of JSON. Go's decoder, and so OPA, rejects a bundle with 10,000 levels.
pub const JSON_DEPTH_MAX: usize = 1000;
/// Maximum number of problems listed.
pub const PROBLEMS_MAX: usize = 1000;
/// Maximum number of manifest files, so that `/` fails early.
pub const MANIFEST_FILES_MAX: usize = 20_000;
/// Debounce of folder changes. Editors write a file in several steps.
pub const FOLDER_SETTLE: Duration = Duration::from_millis(20);
/// Maximum total debounce.
pub const FOLDER_SETTLE_MAX: Duration = Duration::from_millis(500);
/// Interval of unconditional scans. Replaced folders and network file systems report no changes.
pub const FOLDER_RESCAN: Duration = Duration::from_secs(5);
/// Number of file descriptors below which the hub warns. Each stream uses one.
pub const FILES_WANTED: u64 = 16_384;
/// Maximum number of unaccepted connections (kernel limit: `net.core.somaxconn`). Dropped clients retry after 1 s,
/// then 2 s.
pub const LISTEN_BACKLOG: u32 = 16_384;
/// Maximum number of concurrently peeked request heads.
pub const HEADS_MAX: usize = 512;
/// Maximum bytes of a stream's request head: a position of 200 watches. Others go to axum.
pub const HEAD_BYTES_MAX: usize = 16 << 10;
/// Maximum time to peek at a request head. Slower connections go to axum.
pub const HEAD_MAX: Duration = Duration::from_millis(200);
/// Poll interval for an incomplete request head.
pub const HEAD_LOOK: Duration = Duration::from_millis(5);
/// Timeout of a request head and of idle connections. No multiple of 15 s, a common scrape interval.
pub const REQUEST_HEAD_MAX: Duration = Duration::from_secs(20);
/// Timeout of a request body.
pub const REQUEST_BODY_MAX: Duration = Duration::from_secs(10);
/// Maximum number of connections of a listener besides streams.
pub const CONNECTIONS_MAX: usize = 16_384;
/// TCP keepalive time and interval. A dead peer's connection ends after [`WRITE_TIMEOUT`].
pub const KEEPALIVE: Duration = Duration::from_secs(60);
/// Pause after a failed accept, usually for lack of file descriptors.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Send buffer of a stream in bytes. The default of 4 MB hides 12,700 small frames from backpressure.
pub const SEND_BUFFER: usize = 16 << 10;
/// Maximum bytes of encoded frames of one bundle. Above it, clients wait for large frames.
pub const FRAMES_LIVE_MAX: usize = 128 << 20;
/// Time after which a stalled client is disconnected while frame memory is exhausted.
pub const LARGE_STALL_MAX: Duration = Duration::from_secs(15);
/// Minimum unsent bytes for such a disconnect, without the kernel's buffer.
pub const LARGE_REST: usize = 256 << 10;
/// Number of streams written before yielding: 3 ms.
pub const ROUND_SLICE: usize = 256;
/// Timeout of the peer's acknowledgment. Full windows count (tcp(7), `TCP_USER_TIMEOUT`): less would evict slow
/// clients.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(300);
/// Maximum time for a peer's readiness response at shutdown, DNS lookup included.
pub const FAREWELL_MAX: Duration = Duration::from_secs(1);
/// Maximum number of peers asked and named at shutdown.
pub const FAREWELL_REPLICAS_MAX: usize = 16;
/// Maximum number of rounds in which shutdown disconnects streams.
pub const DRAIN_ROUNDS: usize = 20;
/// Length of one such round.
pub const DRAIN_ROUND: Duration = Duration::from_millis(100);
/// Writes of 36 KB per round to a stream with a partial frame.
pub const DRAIN_LOOKS: usize = 10;
/// Maximum time to finish partial frames.
pub const DRAIN_HALVES: Duration = Duration::from_secs(3);
/// Maximum time for requests in flight at shutdown.
pub const DRAIN: Duration = Duration::from_secs(5);
/// First pause after a failed watch or discovery, doubled by each failure.
pub const RETRY: Duration = Duration::from_millis(500);
/// Maximum pause between retries.
pub const RETRY_MAX: Duration = Duration::from_secs(10);
/// Length of one watch in seconds. Each renewal proves that the source is reachable.
pub const WATCH_SECONDS: u32 = 20;
/// Timeout of a streaming list in seconds. 150,000 pods take an API server two minutes.
pub const LIST_SECONDS: u32 = 300;
/// Timeout of one API server response.
pub const SOURCE_ANSWER: Duration = Duration::from_secs(30);
/// Initial number of objects in a list page, as in client-go. Halved after a timeout.
pub const LIST_PAGE: u32 = 500;
/// Minimum number of objects in a list page: at most 30 MB in [`SOURCE_ANSWER`].
pub const LIST_PAGE_MIN: u32 = 20;
/// Time without contact after which a watch is stale.
pub const STALE_AFTER: Duration = Duration::from_secs(30);

/// Maximum checks of one search for offenders: 1 s with a hundred modules. Newer edits wait meanwhile.
pub const CHECKS_MAX: usize = 32;
/// Minimum checks of one search. They decide at least one ConfigMap.
pub const CHECKS_MIN: usize = 6;
/// Time after which a search starts no check beyond [`CHECKS_MIN`]. A failing check takes up to [`CHECK_MAX`].
pub const SETTLE_MAX: Duration = Duration::from_secs(60);
/// Maximum time of one OPA run. 10,000 modules take a second.
pub const CHECK_MAX: Duration = Duration::from_secs(10);
/// Maximum time of one test run.
pub const TEST_RUN_MAX: Duration = Duration::from_secs(30);
/// Maximum number of diagnostics of one OPA run.
pub const CHECK_FAULTS_MAX: usize = 100;
/// Maximum output bytes of one OPA run. Diagnostics quote lines as long as a ConfigMap.
pub const CHECK_OUTPUT_MAX: u64 = 128 << 20;
/// Timeout of one policy test in seconds, OPA's default.
pub const TEST_SECONDS: u64 = 5;
/// Time for starting single test runs after the joint run timed out. One check takes this plus two [`TEST_RUN_MAX`].
pub const TESTS_MAX: Duration = Duration::from_secs(30);
/// Pause before unchanged tests that timed out run again.
pub const TESTS_PAUSE: Duration = Duration::from_secs(600);
/// Maximum number of bundles. Each has two threads and runs OPA.
pub const BUNDLES_MAX: usize = 200;
/// Poll interval of a bundle document file.
pub const DOCUMENTS_LOOK: Duration = Duration::from_secs(1);
/// Pause before retrying a failed OPA run.
pub const CHECK_RETRY: Duration = Duration::from_secs(2);

/// Delay of removing unread fields. Agents that replaced their policies need not reconcile.
pub const NARROW_AFTER: Duration = Duration::from_secs(5);
/// Maximum number of cached namespace views.
pub const SCOPES_MAX: usize = 10_000;
/// Idle time after which a namespace view is evicted.
pub const SCOPE_IDLE: Duration = Duration::from_secs(60);
/// Maximum number of automatically replicated resources, each with a watch.
pub const AUTO_FEEDS_MAX: usize = 100;
/// Maximum time that a policy waits for newly read resources.
pub const AUTO_LIST_MAX: Duration = Duration::from_secs(30);
/// Lease duration, client-go's default.
pub const LEASE: Duration = Duration::from_secs(15);
/// Time without renewal after which a leader stops writing, client-go's default. The rest of [`LEASE`] covers
/// requests in flight.
pub const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Interval of attempts to acquire or renew the Lease, client-go's default.
pub const LEASE_RENEW: Duration = Duration::from_secs(2);
/// Timeout of one attempt. As in client-go, a lost packet does not end leadership.
pub const LEASE_TIMEOUT: Duration = Duration::from_secs(5);
const _: () = assert!(2 * LEASE_RENEW.as_secs() + LEASE_TIMEOUT.as_secs() < RENEW_DEADLINE.as_secs());
const _: () = assert!(RENEW_DEADLINE.as_secs() + LEASE_TIMEOUT.as_secs() <= LEASE.as_secs());
/// Timeout of a write-back request with kube's retries. Tolerates a busy API server and bounds startup delay.
pub const WRITEBACK_TIMEOUT: Duration = Duration::from_secs(10);
/// Minimum interval of rewriting a removed verdict.
pub const VERDICT_AGAIN: Duration = Duration::from_secs(60);
/// Interval of document status updates.
pub const STATUS_LOOK: Duration = Duration::from_secs(10);
/// Maximum number of problems in a document status.
pub const STATUS_PROBLEMS_MAX: usize = 5;
/// Interval of looking for removed verdicts.
pub const VERDICT_LOOK: Duration = Duration::from_secs(10);
/// Maximum compressed bytes of last good policies in a ConfigMap of 1 MiB.
pub const LAST_GOOD_OBJECT_MAX: usize = 1_000_000;
/// Maximum bytes of last good policies. JSON escapes take up to six bytes each.
pub const LAST_GOOD_BYTES_MAX: u64 = 100 << 20;
/// Debounce of writing last good policies.
pub const LAST_GOOD_SETTLE: Duration = Duration::from_millis(100);

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
    /// Bundle configured by flags. `None` if documents define the bundles.
    pub flags: Option<Spec>,
    /// File of bundle documents.
    pub documents: Option<PathBuf>,
    /// OPA binary for policy checks. `None` selects `opa` on the search path.
    pub opa: Option<PathBuf>,
    /// Folder for last good policies. `None` selects the cluster, if there is one.
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
        /// File from `--kubeconfig`. `None` selects the environment, then the cluster of the pod.
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

//! Shared limits of the hub, and its validated configuration.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::bundle::spec::Spec;

/// Maximum events between source and store. A full queue holds back the watch.
pub const EVENT_QUEUE_MAX: usize = 1024;
/// Maximum events in one commit: about 50 ms under load.
pub const COMMIT_EVENTS_MAX: usize = 4096;

/// Limits of one bundle. Tests lower them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BundleLimits {
    /// Maximum commits in the history: 40 s at 10 ms each.
    pub log_commits_max: usize,
    /// Maximum keys in the history: about 10 MB.
    pub log_keys_max: usize,
    /// Maximum bytes of edits in the history.
    pub log_edit_bytes_max: usize,
    /// Maximum events in one commit.
    pub commit_events_max: usize,
    /// Maximum directories in a snapshot. Archive headers contain their digests (8 MiB).
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

/// Interval of stream heartbeats, which reveal a lost hub and satisfy proxies.
pub const HEARTBEAT: Duration = Duration::from_secs(5);
/// Maximum duration of a long poll. OPA's default is 30 s.
pub const LONG_POLL_MAX: Duration = Duration::from_secs(300);
/// Minimum interval of bundle archives. OPA parses each one completely.
pub const SNAPSHOT_INTERVAL: Duration = Duration::from_secs(1);
/// Minimum JSON bytes of a compressed segment. Smaller ones grow the output by over 5 %.
pub const SEGMENT_BYTES_MIN: usize = 64 << 10;
/// JSON bytes after which a segment ends: about what one change recompresses.
pub const SEGMENT_BYTES_MAX: usize = 1 << 20;
/// Maximum clients remembered for a failed native delta.
pub const DELTA_CLIENTS_MAX: usize = 4096;
/// Maximum cached reconcile responses of one bundle.
pub const RECONCILE_CACHE_MAX: usize = 1024;
/// Maximum bytes of cached reconcile responses. The newest is always cached.
pub const RECONCILE_CACHE_BYTES_MAX: usize = 64 << 20;
/// Maximum bytes of cached or unsent reconcile responses of one bundle.
pub const RECONCILE_LIVE_MAX: usize = 128 << 20;
/// Maximum concurrent reconcile encodes of one bundle. Each uses a core.
pub const RECONCILE_ENCODES_MAX: usize = 1;
/// Maximum bytes of pending reconcile requests of one bundle: 280 with 3,000 directories.
pub const RECONCILE_REQUESTS_MAX: usize = 64 << 20;
/// Minimum bytes charged for a reconcile request: at most 4,096 wait.
pub const RECONCILE_REQUEST_MIN: usize = 16 << 10;
/// Maximum bytes of a manifest file.
pub const MANIFEST_BYTES_MAX: u64 = 512 << 20;
/// Maximum depth of JSON. OPA rejects bundles with 10,000 levels.
pub const JSON_DEPTH_MAX: usize = 1000;
/// Maximum problems listed.
pub const PROBLEMS_MAX: usize = 1000;
/// Maximum manifest files, so that `/` fails early.
pub const MANIFEST_FILES_MAX: usize = 20_000;
/// Debounce of folder changes. Editors write in several steps.
pub const FOLDER_SETTLE: Duration = Duration::from_millis(20);
/// Maximum debounce of folder changes.
pub const FOLDER_SETTLE_MAX: Duration = Duration::from_millis(500);
/// Interval of full scans. Replaced folders and network file systems report no changes.
pub const FOLDER_RESCAN: Duration = Duration::from_secs(5);
/// File descriptors below which the hub warns. Each stream uses one.
pub const FILES_WANTED: u64 = 16_384;
/// Maximum unaccepted connections (kernel limit: `net.core.somaxconn`). Dropped clients retry after 1 s.
pub const LISTEN_BACKLOG: u32 = 16_384;
/// Maximum request heads peeked concurrently.
pub const HEADS_MAX: usize = 512;
/// Maximum bytes of a stream's request head: 200 watches.
pub const HEAD_BYTES_MAX: usize = 16 << 10;
/// Maximum time to peek at a head. Slower connections go to axum.
pub const HEAD_MAX: Duration = Duration::from_millis(200);
/// Interval of peeking at an incomplete head.
pub const HEAD_LOOK: Duration = Duration::from_millis(5);
/// Timeout of request heads and idle connections. Scrapes every 15 s stay connected.
pub const REQUEST_HEAD_MAX: Duration = Duration::from_secs(20);
/// Timeout of a request body.
pub const REQUEST_BODY_MAX: Duration = Duration::from_secs(10);
/// Maximum connections of a listener besides streams.
pub const CONNECTIONS_MAX: usize = 16_384;
/// TCP keepalive time and interval.
pub const KEEPALIVE: Duration = Duration::from_secs(60);
/// Pause after a failed accept, usually for lack of file descriptors.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Send buffer of a stream in bytes. The default, 4 MB, hides stalled clients.
pub const SEND_BUFFER: usize = 16 << 10;
/// Maximum bytes of encoded frames of one bundle. Above it, clients wait for large frames.
pub const FRAMES_LIVE_MAX: usize = 128 << 20;
/// Time after which a stalled client is disconnected while frame memory is exhausted.
pub const LARGE_STALL_MAX: Duration = Duration::from_secs(15);
/// Minimum unsent bytes of a stalled client, kernel buffers aside.
pub const LARGE_REST: usize = 256 << 10;
/// Streams written before yielding: 3 ms.
pub const ROUND_SLICE: usize = 256;
/// Timeout of TCP acknowledgment. Full windows count too (tcp(7), `TCP_USER_TIMEOUT`): less would evict slow clients.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(300);
/// Timeout of a peer's readiness response at shutdown, with DNS.
pub const FAREWELL_MAX: Duration = Duration::from_secs(1);
/// Maximum peers asked and named at shutdown.
pub const FAREWELL_REPLICAS_MAX: usize = 16;
/// Maximum rounds of disconnects at shutdown.
pub const DRAIN_ROUNDS: usize = 20;
/// Length of one drain round.
pub const DRAIN_ROUND: Duration = Duration::from_millis(100);
/// Writes per round to a stream with a partial frame.
pub const DRAIN_LOOKS: usize = 10;
/// Maximum time to finish partial frames.
pub const DRAIN_HALVES: Duration = Duration::from_secs(3);
/// Maximum time for requests in flight at shutdown.
pub const DRAIN: Duration = Duration::from_secs(5);
/// First pause after a failed watch, doubled by each failure.
pub const RETRY: Duration = Duration::from_millis(500);
/// Maximum pause after a failed watch.
pub const RETRY_MAX: Duration = Duration::from_secs(10);
/// Length of a watch in seconds. Renewals prove contact.
pub const WATCH_SECONDS: u32 = 20;
/// Timeout of a streaming list in seconds. 150,000 pods take two minutes.
pub const LIST_SECONDS: u32 = 300;
/// Timeout of one API server response.
pub const SOURCE_ANSWER: Duration = Duration::from_secs(30);
/// Objects in a list page, as in client-go. Timeouts halve it.
pub const LIST_PAGE: u32 = 500;
/// Minimum objects in a list page: 30 MB in [`SOURCE_ANSWER`].
pub const LIST_PAGE_MIN: u32 = 20;
/// Time without contact after which a watch is stale.
pub const STALE_AFTER: Duration = Duration::from_secs(30);

/// Maximum checks of one search for offenders: 1 s with a hundred modules.
pub const CHECKS_MAX: usize = 32;
/// Minimum checks of one search, which decide at least one ConfigMap.
pub const CHECKS_MIN: usize = 6;
/// Time after which a search starts no check, [`CHECKS_MIN`] aside. A failing check takes [`CHECK_MAX`].
pub const SETTLE_MAX: Duration = Duration::from_secs(60);
/// Timeout of one OPA run. 10,000 modules take a second.
pub const CHECK_MAX: Duration = Duration::from_secs(10);
/// Timeout of one test run.
pub const TEST_RUN_MAX: Duration = Duration::from_secs(30);
/// Maximum diagnostics of one OPA run.
pub const CHECK_FAULTS_MAX: usize = 100;
/// Maximum output bytes of one OPA run. Diagnostics quote whole lines.
pub const CHECK_OUTPUT_MAX: u64 = 128 << 20;
/// Timeout of one test in seconds, OPA's default.
pub const TEST_SECONDS: u64 = 5;
/// Time for starting separate test runs after the joint run timed out. A check takes two [`TEST_RUN_MAX`] more.
pub const TESTS_MAX: Duration = Duration::from_secs(30);
/// Pause before unchanged tests that timed out run again.
pub const TESTS_PAUSE: Duration = Duration::from_secs(600);
/// Maximum bundles. Each has two threads and runs OPA.
pub const BUNDLES_MAX: usize = 200;
/// Poll interval of a document file.
pub const DOCUMENTS_LOOK: Duration = Duration::from_secs(1);
/// Pause after a failed OPA run.
pub const CHECK_RETRY: Duration = Duration::from_secs(2);

/// Delay of removing unread fields. Agents with the new policies need not reconcile.
pub const NARROW_AFTER: Duration = Duration::from_secs(5);
/// Maximum cached namespace views.
pub const SCOPES_MAX: usize = 10_000;
/// Idle time of a namespace view before eviction.
pub const SCOPE_IDLE: Duration = Duration::from_secs(60);
/// Maximum automatically replicated resources, a watch each.
pub const AUTO_FEEDS_MAX: usize = 100;
/// Maximum wait of a policy for newly read resources.
pub const AUTO_LIST_MAX: Duration = Duration::from_secs(30);
/// Lease duration, client-go's default.
pub const LEASE: Duration = Duration::from_secs(15);
/// Maximum time of writing without renewal, client-go's default. The margin covers requests in flight.
pub const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Interval of acquiring or renewing the Lease, client-go's default.
pub const LEASE_RENEW: Duration = Duration::from_secs(2);
/// Timeout of one Lease attempt. A lost packet must not end leadership.
pub const LEASE_TIMEOUT: Duration = Duration::from_secs(5);
const _: () = assert!(2 * LEASE_RENEW.as_secs() + LEASE_TIMEOUT.as_secs() < RENEW_DEADLINE.as_secs());
const _: () = assert!(RENEW_DEADLINE.as_secs() + LEASE_TIMEOUT.as_secs() <= LEASE.as_secs());
/// Timeout of a write-back request with kube's retries, for busy API servers.
pub const WRITEBACK_TIMEOUT: Duration = Duration::from_secs(10);
/// Minimum interval of rewriting a removed verdict.
pub const VERDICT_AGAIN: Duration = Duration::from_secs(60);
/// Interval of document status updates.
pub const STATUS_LOOK: Duration = Duration::from_secs(10);
/// Maximum problems in a document status.
pub const STATUS_PROBLEMS_MAX: usize = 5;
/// Interval of looking for removed verdicts.
pub const VERDICT_LOOK: Duration = Duration::from_secs(10);
/// Maximum compressed bytes of last good policies in a ConfigMap of 1 MiB.
pub const LAST_GOOD_OBJECT_MAX: usize = 1_000_000;
/// Maximum bytes of last good policies, JSON escapes included (up to six bytes each).
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
    /// Bundle configured by flags. `None` with documents only.
    pub flags: Option<Spec>,
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

//! Bounds of the hub that several modules share, each with its unit and its reason, and what the command line is turned
//! into.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::bundle::spec::Spec;

/// Events that a source may be ahead of the writer. A full queue holds back the watch, and so the API server.
pub const EVENT_QUEUE_MAX: usize = 1024;
/// Events that one commit takes at most, so that a storm still publishes about every 50 ms.
pub const COMMIT_EVENTS_MAX: usize = 4096;

/// Limits of one bundle. Tests lower them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BundleLimits {
    /// Maximum number of commits in the log: at one commit every 10 ms, 40 s in which an agent may be away and resume by
    /// frame.
    pub log_commits_max: usize,
    /// Maximum number of keys in the log over all its commits: 64 Ki × about 150 bytes = 10 MB.
    pub log_keys_max: usize,
    /// Maximum bytes of edits in the log over all its commits.
    pub log_edit_bytes_max: usize,
    /// Maximum number of events in one commit.
    pub commit_events_max: usize,
    /// Maximum number of directories of one view: their digests travel in every archive's head (8 MiB).
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

/// A comment this often keeps a stream alive through proxies, and tells an agent that the hub is there.
pub const HEARTBEAT: Duration = Duration::from_secs(5);
/// The longest long poll that is granted; OPA's default is 30 s at most.
pub const LONG_POLL_MAX: Duration = Duration::from_secs(300);
/// Bundle URLs trail the head by up to this, so that churn costs OPAs one activation a second at most
/// (an activation parses every module and the whole of the data).
pub const SNAPSHOT_INTERVAL: Duration = Duration::from_secs(1);
/// JSON bytes after which a compressed segment may end: below 64 KiB deflate loses more than 5 % of its size.
pub const SEGMENT_BYTES_MIN: usize = 64 << 10;
/// JSON bytes after which a segment ends at the next chunk: a change compresses about this much again.
pub const SEGMENT_BYTES_MAX: usize = 1 << 20;
/// Agents that failed an opt-in native delta are remembered, so that they get a snapshot next.
pub const DELTA_CLIENTS_MAX: usize = 4096;
/// Reconcile answers of one bundle, over all its namespaces, that are cached for clients that send the same request …
pub const RECONCILE_CACHE_MAX: usize = 1024;
/// … and the bytes that they take together; the newest is cached whatever its size.
pub const RECONCILE_CACHE_BYTES_MAX: usize = 64 << 20;
/// Bytes of reconcile answers of one bundle that are cached or being sent. Above it no further answer is encoded.
pub const RECONCILE_LIVE_MAX: usize = 128 << 20;
/// Reconcile answers of one bundle that are encoded at a time: each may copy the whole view, and takes a core from what
/// changes other bundles.
pub const RECONCILE_ENCODES_MAX: usize = 1;
/// Bytes of reconcile requests of one bundle that are read or wait for their answer: 280 clients with 3,000 directories.
/// Parsed, a request takes two to three times its bytes.
pub const RECONCILE_REQUESTS_MAX: usize = 64 << 20;
/// Bytes that the smallest reconcile request counts as, so that at most 4,096 wait.
pub const RECONCILE_REQUEST_MIN: usize = 16 << 10;
/// Bytes of one manifest file.
pub const MANIFEST_BYTES_MAX: u64 = 512 << 20;
/// Levels of a JSON value. Go's decoder, and so OPA, refuses 10,000, and with it the whole bundle.
pub const JSON_DEPTH_MAX: usize = 1000;
/// Refused items that are shown: the first of them are enough to know what is wrong.
pub const PROBLEMS_MAX: usize = 1000;
/// Files below a manifests folder, so that pointing the hub at `/` says so instead of reading the disk.
pub const MANIFEST_FILES_MAX: usize = 20_000;
/// An editor writes a file in several steps: the folder is read when it was quiet for this long.
pub const FOLDER_SETTLE: Duration = Duration::from_millis(20);
/// … but no longer than this, however busy it is.
pub const FOLDER_SETTLE_MAX: Duration = Duration::from_millis(500);
/// The folder is read this often whatever the system reports: it may have been replaced, or lie on a network.
pub const FOLDER_RESCAN: Duration = Duration::from_secs(5);
/// File descriptors below which the hub warns: each stream takes one.
pub const FILES_WANTED: u64 = 16_384;
/// Connections that wait to be accepted; the kernel's bound is `net.core.somaxconn`. Who finds the queue full tries
/// again after a second, then two: of 10,000 agents whose hub died at once some took 4.5 s.
pub const LISTEN_BACKLOG: u32 = 16_384;
/// Heads of requests that are looked at at a time: a storm of connections waits in the kernel's queue.
pub const HEADS_MAX: usize = 512;
/// Bytes of the head of a request for a stream, with a position of 200 feeds; one that is longer is axum's.
pub const HEAD_BYTES_MAX: usize = 16 << 10;
/// A connection that has not said this long what it wants is axum's, so that silent ones hold nobody up for long …
pub const HEAD_MAX: Duration = Duration::from_millis(200);
/// … and a head that comes in pieces is looked at this often.
pub const HEAD_LOOK: Duration = Duration::from_millis(5);
/// Maximum time for the head of a request, and so for a connection that is idle after a response. Longer than the common
/// scrape interval of 15 s, and no multiple of it.
pub const REQUEST_HEAD_MAX: Duration = Duration::from_secs(20);
/// Maximum time for the body of a request. An agent waits this long for its response.
pub const REQUEST_BODY_MAX: Duration = Duration::from_secs(10);
/// Maximum number of open connections of a listener, besides streams in the fan-out: OPAs that poll and agents that load
/// hold one each. Further ones wait in the kernel's queue.
pub const CONNECTIONS_MAX: usize = 16_384;
/// Time after which the kernel probes a connection on which nothing travels, and between two probes. One whose machine
/// does not answer ends after [`WRITE_TIMEOUT`].
pub const KEEPALIVE: Duration = Duration::from_secs(60);
/// Before the next connection is accepted when one could not be: there are no file descriptors left, mostly.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Bytes that the kernel takes of a stream whose reader does not read, twice that with its own: without a limit it
/// takes 4 MB, 12,700 small frames, before anybody notices.
pub const SEND_BUFFER: usize = 16 << 10;
/// Bytes of frames of one bundle that are kept or under way: beyond, none of many keys is encoded. Who is far behind waits
/// for those who read theirs …
pub const FRAMES_LIVE_MAX: usize = 128 << 20;
/// … and whoever has not read on for this long …
pub const LARGE_STALL_MAX: Duration = Duration::from_secs(15);
/// … of more than this, which is not the kernel's, goes and comes back.
pub const LARGE_REST: usize = 256 << 10;
/// Streams that are written to before others have their turn: 3 ms.
pub const ROUND_SLICE: usize = 256;
/// A reader whose machine does not acknowledge what it was sent is given up after this. Shorter would take streams from
/// readers that only do not read: the kernel counts a full window too (tcp(7), `TCP_USER_TIMEOUT`).
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(300);
/// A hub that stops asks the other replicas whether they are ready: who has not said so in this time, with a look into the
/// DNS, is not named …
pub const FAREWELL_MAX: Duration = Duration::from_secs(1);
/// … and so many are asked, and named to readers.
pub const FAREWELL_REPLICAS_MAX: usize = 16;
/// A hub that stops ends its streams in at most so many rounds …
pub const DRAIN_ROUNDS: usize = 20;
/// … of this length.
pub const DRAIN_ROUND: Duration = Duration::from_millis(100);
/// So often in a round those who have half of a frame are written to: 36 KB each time …
pub const DRAIN_LOOKS: usize = 10;
/// … and the hub waits so long at most for them to take the rest.
pub const DRAIN_HALVES: Duration = Duration::from_secs(3);
/// Requests in flight get this long to end at shutdown.
pub const DRAIN: Duration = Duration::from_secs(5);
/// Between tries to find a resource that the API server does not serve yet, and after a watch that failed: doubled …
pub const RETRY: Duration = Duration::from_millis(500);
/// … up to this: a hub is one of few, and its agents wait.
pub const RETRY_MAX: Duration = Duration::from_secs(10);
/// A watch is renewed this often, which proves that the source is there; silence beyond is a connection that died.
/// Seconds.
pub const WATCH_SECONDS: u32 = 20;
/// A list by watch gets this long: 150,000 pods take an API server two minutes. Seconds.
pub const LIST_SECONDS: u32 = 300;
/// A server answers a list's page or a watch within this time, or is taken to be gone.
pub const SOURCE_ANSWER: Duration = Duration::from_secs(30);
/// Objects of one page of a list: what client-go asks for. A page that times out is asked for again at half the size …
pub const LIST_PAGE: u32 = 500;
/// … down to this many: 30 MB of the largest objects that etcd stores, in [`SOURCE_ANSWER`].
pub const LIST_PAGE_MIN: u32 = 20;
/// A source that was not heard for this long may have gone on without us: its watches are renewed sooner than that.
pub const STALE_AFTER: Duration = Duration::from_secs(30);

/// How often all modules are compiled at most to find out whose change breaks them: about 1 s of OPA with a hundred
/// modules, after which newer edits have their turn.
pub const CHECKS_MAX: usize = 32;
/// Minimum checks of one search, whatever time they take: enough that each search decides on one ConfigMap at least.
pub const CHECKS_MIN: usize = 6;
/// Time after which a search starts no further check once it had its minimum: a check that fails takes up to
/// [`CHECK_MAX`], and newer edits wait for the search.
pub const SETTLE_MAX: Duration = Duration::from_secs(60);
/// Maximum time of one run of OPA: 10,000 modules take it a second, and while it runs newer edits wait.
pub const CHECK_MAX: Duration = Duration::from_secs(10);
/// Maximum time of one run of tests.
pub const TEST_RUN_MAX: Duration = Duration::from_secs(30);
/// Errors that one run tells: enough to name many ConfigMaps at once.
pub const CHECK_FAULTS_MAX: usize = 100;
/// Bytes that one run writes: an error quotes its line, which may be as long as a ConfigMap.
pub const CHECK_OUTPUT_MAX: u64 = 128 << 20;
/// Seconds that one test of a policy may take: OPA's own default.
pub const TEST_SECONDS: u64 = 5;
/// When all tests together take longer than [`TEST_RUN_MAX`], those of each ConfigMap are run alone. After this time no
/// further run is started: one check takes [`TEST_RUN_MAX`] for the joint run, this, and one more [`TEST_RUN_MAX`].
pub const TESTS_MAX: Duration = Duration::from_secs(30);
/// Tests that took longer than one run of OPA may are run again after this time, or when their texts change.
pub const TESTS_PAUSE: Duration = Duration::from_secs(600);
/// Bundles of one hub: each has two threads, and policies of its own to be checked.
pub const BUNDLES_MAX: usize = 200;
/// A file of bundle documents is looked at this often.
pub const DOCUMENTS_LOOK: Duration = Duration::from_secs(1);
/// Pause before OPA is run again after it failed itself.
pub const CHECK_RETRY: Duration = Duration::from_secs(2);

/// Fields that no policy reads any more leave this long after the policies that did, so that agents are past those;
/// who is not takes a longer way.
pub const NARROW_AFTER: Duration = Duration::from_secs(5);
/// Namespaces whose views are kept at a time …
pub const SCOPES_MAX: usize = 10_000;
/// … and for how long while nobody asks.
pub const SCOPE_IDLE: Duration = Duration::from_secs(60);
/// Resources that policies may have replicated: each is a watch.
pub const AUTO_FEEDS_MAX: usize = 100;
/// How long a policy waits for the resources that it is the first to read.
pub const AUTO_LIST_MAX: Duration = Duration::from_secs(30);
/// Other replicas may acquire a Lease that was not renewed for this long. client-go's default lease duration.
pub const LEASE: Duration = Duration::from_secs(15);
/// A leader that has not renewed its Lease for this long stops writing. client-go's default renew deadline. The rest of
/// [`LEASE`] is a margin for bytes that are already on their way.
pub const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Interval between two attempts to acquire or renew the Lease. client-go's default retry period.
pub const LEASE_RENEW: Duration = Duration::from_secs(2);
/// Maximum duration of one such attempt. Half the renew deadline, as in client-go: one lost packet does not end
/// leadership.
pub const LEASE_TIMEOUT: Duration = Duration::from_secs(5);
const _: () = assert!(2 * LEASE_RENEW.as_secs() + LEASE_TIMEOUT.as_secs() < RENEW_DEADLINE.as_secs());
const _: () = assert!(RENEW_DEADLINE.as_secs() + LEASE_TIMEOUT.as_secs() <= LEASE.as_secs());
/// Maximum duration of one request that reads or writes verdicts, statuses, Events or last good policies, with the
/// retries that kube's client makes inside. Longer than a busy API server takes, and short enough that a lost packet
/// delays a start little.
pub const WRITEBACK_TIMEOUT: Duration = Duration::from_secs(10);
/// The same verdict is written to the same ConfigMap again, where somebody removed it, no sooner than after this.
pub const VERDICT_AGAIN: Duration = Duration::from_secs(60);
/// What is wrong with a bundle is looked at this often, for its document's status …
pub const STATUS_LOOK: Duration = Duration::from_secs(10);
/// … which tells so many.
pub const STATUS_PROBLEMS_MAX: usize = 5;
/// Whether that time has come is looked at this often.
pub const VERDICT_LOOK: Duration = Duration::from_secs(10);
/// Bytes of the compressed last good policies in a ConfigMap, which holds 1 MiB with its metadata.
pub const LAST_GOOD_OBJECT_MAX: usize = 1_000_000;
/// Bytes of the last good policies: all modules in JSON, where a byte takes six at worst.
pub const LAST_GOOD_BYTES_MAX: u64 = 100 << 20;
/// They are kept this long after they changed, so that a storm of edits is written once.
pub const LAST_GOOD_SETTLE: Duration = Duration::from_millis(100);

/// What the hub was told to do.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where objects come from.
    pub source: Source,
    /// Where to serve.
    pub listen: SocketAddr,
    /// Where health is served besides.
    pub health: Option<SocketAddr>,
    /// Other hubs like this one, as `HOST:PORT`: where readers go when it stops.
    pub replicas: Vec<String>,
    /// The bundle of the flags' name, which the hub's Lease has too.
    pub bundle: String,
    /// The bundle that flags ask for; none: documents say which there are.
    pub flags: Option<Spec>,
    /// A file of documents.
    pub documents: Option<PathBuf>,
    /// The OPA that checks policies; none: `opa` on the search path.
    pub opa: Option<PathBuf>,
    /// Where the last good policies are kept over a restart; none: in the cluster, if there is one.
    pub state_dir: Option<PathBuf>,
    /// Whether verdicts are written to ConfigMaps, where the source is a cluster.
    pub write_verdicts: bool,
    /// The hub's own namespace; none: that of its pod or of its kubeconfig.
    pub namespace: Option<String>,
}

/// Where objects come from.
#[derive(Debug, Clone)]
pub enum Source {
    /// A Kubernetes API server: by this kubeconfig, else as the environment says, else in-cluster.
    Kubernetes {
        /// The file given by `--kubeconfig`.
        kubeconfig: Option<PathBuf>,
    },
    /// A folder of manifests.
    Folder(PathBuf),
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Kubernetes { kubeconfig: Some(path) } => write!(f, "the cluster of {}", path.display()),
            Self::Kubernetes { kubeconfig: None } => f.write_str("the cluster of the environment"),
            Self::Folder(dir) => write!(f, "the folder {}", dir.display()),
        }
    }
}

//! Archives of views. Compressed segments are cached, so a change compresses only its segment again.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use opa_hub_proto::head::{DataHead, HEAD_FILE, Head};
use opa_hub_proto::manifest::{DATA_FILE, MANIFEST_FILE, Manifest, distinct_roots, module_file};
use opa_hub_proto::path::DirPath;
use opa_hub_proto::reconcile::Reconcile;
use opa_hub_proto::revision::{Digest, Hasher};

use crate::snapshot::archive::{Archive, Segment, push_file, push_header, push_padding};
use crate::snapshot::frame::enclosing;
use crate::snapshot::{Chunk, Directory, Snapshot, within};

/// Minimum JSON bytes of a compressed segment. Smaller ones grow the output by over 5 %.
pub const SEGMENT_BYTES_MIN: usize = 64 << 10;
/// JSON bytes after which a segment ends: about what one change recompresses.
pub const SEGMENT_BYTES_MAX: usize = 1 << 20;

/// Mean chunks of a segment beyond the minimum. The content of a chunk decides, so that a change moves few ends.
const SEGMENT_CHUNKS_MEAN: u8 = 4;

/// Segments of the last archive, by content digest.
#[derive(Default)]
pub(crate) struct SegmentCache(Mutex<HashMap<Digest, Segment>>);

pub(crate) fn whole(view: &Snapshot, part: ArchiveKind, bundle: &str, cache: &SegmentCache) -> Archive {
    let dirs: Vec<_> = if part.has_data() { view.dirs.iter().collect() } else { Vec::new() };
    let modules: Vec<_> = if part.has_modules() { view.modules.keys().collect() } else { Vec::new() };
    let mut first = Vec::new();
    push_file(&mut first, HEAD_FILE, &head(view, part));
    let manifest = Manifest {
        revision: part.revision(view),
        roots: roots(view, part, bundle),
        rego_version: view.rego_version.filter(|_| part.has_modules()),
    };
    push_file(
        &mut first,
        MANIFEST_FILE,
        &serde_json::to_vec(&manifest).expect("a manifest has text keys only"),
    );
    push_modules(&mut first, view, &modules);
    if part.has_data() {
        for prefix in view.ensure.iter().filter(|prefix| within(&view.dirs, prefix).next().is_none()) {
            push_file(&mut first, &data_file(prefix), b"{}");
        }
    }
    let mut used = HashMap::new();
    let segments = segments(&dirs, cache, &mut used);
    let archive = Archive::new([Segment::new(&first)].into_iter().chain(segments));
    if part.has_data() {
        *cache.lock() = used;
    }
    archive
}

/// Encodes the parts of `view` that differ from `request`.
pub(crate) fn difference(view: &Snapshot, request: &Reconcile, cache: &SegmentCache) -> Archive {
    let lacks = |path: &DirPath, dir: &Arc<Directory>| request.dirs.get(path) != Some(&dir.digest);
    let dirs: Vec<_> = view.dirs.iter().filter(|(path, dir)| lacks(path, dir)).collect();
    let modules: Vec<_> = match &request.modules {
        None => Vec::new(),
        Some(digests) => view
            .modules
            .iter()
            .filter(|(id, m)| digests.get(*id) != Some(&m.digest))
            .map(|(id, _)| id)
            .collect(),
    };
    let mut first = Vec::new();
    push_file(
        &mut first,
        HEAD_FILE,
        &head(view, if request.modules.is_some() { ArchiveKind::Full } else { ArchiveKind::Data }),
    );
    push_modules(&mut first, view, &modules);
    let segments = segments(&dirs, cache, &mut HashMap::new());
    Archive::new([Segment::new(&first)].into_iter().chain(segments))
}

/// Paths below `data` that `part` owns, never `""`.
pub(crate) fn roots(view: &Snapshot, part: ArchiveKind, bundle: &str) -> Vec<String> {
    let mut roots = Vec::new();
    if part.has_modules() {
        roots.extend(view.modules.values().map(|module| module.root.relative().to_owned()));
    }
    if part.has_data() {
        roots.extend(view.ensure.iter().map(|prefix| prefix.relative().to_owned()));
        let others = view.dirs.keys().filter(|dir| enclosing(view, dir).is_none());
        roots.extend(others.map(|dir| dir.relative().to_owned()));
    }
    if roots.is_empty() {
        // To OPA, no roots mean all roots.
        roots.push(format!("opahub/{bundle}/{}", part.name()));
    }
    distinct_roots(roots)
}

fn head(view: &Snapshot, part: ArchiveKind) -> Vec<u8> {
    let head = Head {
        data: part.has_data().then(|| DataHead {
            dirs: view.dirs.iter().map(|(path, dir)| (path.clone(), dir.digest)).collect(),
            ensure: view.ensure.to_vec(),
        }),
        modules: part.has_modules().then(|| {
            view.modules.iter().map(|(id, module)| (id.clone(), module.digest)).collect::<BTreeMap<_, _>>()
        }),
        modules_digest: Some(view.revision.modules),
        reads: view.reads.as_deref().map(str::to_owned),
        rego_version: view.rego_version,
    };
    serde_json::to_vec(&head).expect("a head has text keys only")
}

fn push_modules(tar: &mut Vec<u8>, view: &Snapshot, ids: &[&String]) {
    for id in ids {
        push_file(tar, &module_file(id), view.modules[*id].text.as_bytes());
    }
}

fn data_file(dir: &DirPath) -> String {
    format!("{}/{DATA_FILE}", dir.relative())
}

enum Piece<'a> {
    Open(&'a DirPath, &'a Directory),
    Chunk { chunk: &'a Chunk, first: bool },
    Close(&'a Directory),
}

impl Piece<'_> {
    /// Identifies the bytes of [`write`](Self::write).
    fn hash(&self, hasher: &mut Hasher) {
        match self {
            Self::Open(path, dir) => {
                hasher.part(path.as_str().as_bytes());
                hasher.part(&dir.json_bytes().to_le_bytes());
            }
            Self::Chunk { chunk, first } => {
                hasher.part(chunk.digest.as_bytes());
                hasher.part(&[u8::from(*first)]);
            }
            Self::Close(dir) => hasher.part(&dir.json_bytes().to_le_bytes()),
        }
    }

    fn write(&self, tar: &mut Vec<u8>) {
        match self {
            Self::Open(path, dir) => {
                push_header(tar, &data_file(path), dir.json_bytes());
                tar.push(b'{');
            }
            Self::Chunk { chunk, first } => {
                if !first {
                    tar.push(b',');
                }
                chunk.write_json(tar);
            }
            Self::Close(dir) => {
                tar.push(b'}');
                push_padding(tar, dir.json_bytes());
            }
        }
    }
}

fn segments(
    dirs: &[(&DirPath, &Arc<Directory>)],
    cache: &SegmentCache,
    used: &mut HashMap<Digest, Segment>,
) -> Vec<Segment> {
    let mut segments = Vec::new();
    let mut open: Vec<Piece> = Vec::new();
    let mut bytes = 0;
    let mut close = |open: &mut Vec<Piece>| {
        let mut hasher = Hasher::default();
        for piece in open.iter() {
            piece.hash(&mut hasher);
        }
        let name = hasher.finish();
        let segment = cache.get(name).unwrap_or_else(|| {
            let mut raw = Vec::new();
            for piece in open.iter() {
                piece.write(&mut raw);
            }
            Segment::new(&raw)
        });
        used.insert(name, segment.clone());
        segments.push(segment);
        open.clear();
    };
    for (path, dir) in dirs {
        open.push(Piece::Open(path, dir));
        for (index, chunk) in dir.chunks.iter().enumerate() {
            open.push(Piece::Chunk { chunk, first: index == 0 });
            bytes += chunk.json_bytes;
            let may_end = chunk.digest.as_bytes()[0].is_multiple_of(SEGMENT_CHUNKS_MEAN);
            if bytes >= SEGMENT_BYTES_MAX || bytes >= SEGMENT_BYTES_MIN && may_end {
                close(&mut open);
                bytes = 0;
            }
        }
        open.push(Piece::Close(dir));
    }
    if !open.is_empty() {
        close(&mut open);
    }
    segments
}

impl SegmentCache {
    pub(crate) fn memory(&self) -> usize {
        self.lock().values().map(|segment| segment.len() + size_of::<(Digest, Segment)>()).sum()
    }

    fn get(&self, name: Digest) -> Option<Segment> {
        self.lock().get(&name).cloned()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Digest, Segment>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Content of an archive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ArchiveKind {
    /// Modules and data.
    Full,
    /// Modules.
    Policy,
    /// Data.
    Data,
}

impl ArchiveKind {
    /// Name of the part.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "whole",
            Self::Policy => "policy",
            Self::Data => "data",
        }
    }

    pub(crate) fn has_data(self) -> bool {
        self != Self::Policy
    }

    pub(crate) fn has_modules(self) -> bool {
        self != Self::Data
    }

    /// Whether both views have equal archives. Data archives name their modules.
    pub(crate) fn is_same(self, one: &Snapshot, other: &Snapshot) -> bool {
        self.revision(one) == self.revision(other)
            && one.reads == other.reads
            && (!self.has_data() || one.revision == other.revision)
    }

    /// Revision of the content.
    pub fn revision(self, view: &Snapshot) -> String {
        match self {
            Self::Full => view.revision.to_string(),
            Self::Policy => view.revision.modules.to_string(),
            Self::Data => view.revision.data.to_string(),
        }
    }
}

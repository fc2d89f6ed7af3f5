//! Data-flow analysis of OPA's [`Plan`]: finds the paths below `data` that policies can read.
//!
//! The abstract value of a local has all paths and strings that may reach it. A step by a known string reads
//! that field only. Compared, returned, printed and otherwise unmodelled values are read deeply. Unknown
//! statements read everything.
//!
//! OPA also compares set members, and values that are assigned twice. Two objects of one resource are equal
//! only if their identities are.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use opa_hub_proto::path::DirPath;

use super::plan::{Block, Function, Operand, Plan, Site, Stmt};

/// Maximum path length, for malformed plans.
const STEPS_MAX: usize = 32;
/// Maximum number of paths read; a hundred policies read a few hundred.
const PLACES_MAX: usize = 20_000;
/// Maximum number of paths per value. Six names at twelve levels make 6¹² paths.
const FLOW_PLACES_MAX: usize = 4096;
/// Maximum total path length: about 50 MB.
const STORED_STEPS_MAX: usize = 1_000_000;
/// Maximum number of visits: under 2 s.
const WORK_MAX: usize = 4_000_000;
/// Maximum nesting of tracked containers.
const NESTING_MAX: usize = 8;
/// Maximum number of strings per value. Longer lists are not field names.
const TEXTS_MAX: usize = 64;
/// Maximum length of a tracked list.
const LIST_MAX: usize = 256;
/// Fields that differ between any two objects.
const IDENTITY: [&[&str]; 4] =
    [&["apiVersion"], &["kind"], &["metadata", "name"], &["metadata", "namespace"]];

/// One segment of a path.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Step {
    /// This key.
    Name(Arc<str>),
    /// Any key or index.
    Any,
}

/// A path below `data`.
pub type Place = Vec<Step>;

/// Depth of a read.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Extent {
    /// Existence, type, scalar value.
    Shallow,
    /// Identifying fields of a Kubernetes object.
    Identity,
    /// The complete value.
    Whole,
}

/// Maximum number of locations per path.
const SITES_MAX: usize = 8;

/// Paths read, with source locations.
#[derive(Clone, Default, Debug)]
pub struct Reads(BTreeMap<Place, (Extent, BTreeSet<Site>)>);

/// The analysis exceeded its bounds.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("field analysis failed: the policies choose among too many fields; read fields by constant names")]
pub(crate) struct TooComplex;

impl Reads {
    /// Creates reads located at `sites`.
    pub fn of(places: impl IntoIterator<Item = (Place, Extent)>, sites: &[Site]) -> Self {
        let mut reads = Self::default();
        for (place, extent) in places {
            reads.add(&place, extent, None);
            for site in sites {
                reads.add(&place, extent, Some(site));
            }
        }
        reads
    }

    /// Adds the reads of `other`.
    pub fn join(&mut self, other: Self) {
        for (place, (extent, sites)) in other.0 {
            self.add(&place, extent, None);
            for site in &sites {
                self.add(&place, extent, Some(site));
            }
        }
    }

    /// Returns the paths read in objects `depth` levels below `place`, with [`Extent::Identity`] expanded. An
    /// empty deep path means complete objects.
    pub fn of_objects(&self, place: &DirPath, depth: usize) -> Vec<(Vec<Step>, Extent, &BTreeSet<Site>)> {
        let resource = place.relative().split('/').count();
        let is_name = |step: &Step| matches!(step, Step::Name(_));
        let mut paths = Vec::new();
        for (read, extent, sites) in self.about(place) {
            match (read.get(resource + depth..), extent) {
                (Some([]), Extent::Identity) if read[..resource].iter().all(is_name) => {
                    let path = |names: &[&str]| names.iter().map(|name| Step::Name((*name).into())).collect();
                    paths.extend(IDENTITY.map(|names| (path(names), Extent::Shallow, sites)));
                }
                (Some(steps), Extent::Shallow) => paths.push((steps.to_vec(), Extent::Shallow, sites)),
                (Some(steps), _) => paths.push((steps.to_vec(), Extent::Whole, sites)),
                (None, Extent::Shallow) => {}
                (None, _) => paths.push((Vec::new(), Extent::Whole, sites)),
            }
        }
        paths
    }

    /// Iterates over all reads, sorted.
    pub fn iter(&self) -> impl Iterator<Item = (&Place, Extent, &BTreeSet<Site>)> {
        self.0.iter().map(|(place, (extent, sites))| (place, *extent, sites))
    }

    /// Iterates over reads at, above and below `place`.
    pub fn about(&self, place: &DirPath) -> impl Iterator<Item = (&Place, Extent, &BTreeSet<Site>)> {
        let may_be = |(step, name): (&Step, &str)| match step {
            Step::Name(held) => **held == *name,
            Step::Any => true,
        };
        self.iter().filter(move |(read, ..)| read.iter().zip(place.relative().split('/')).all(may_be))
    }

    /// Returns a deep read of all data, without locations.
    pub fn everything() -> Self {
        Self(BTreeMap::from([(Vec::new(), (Extent::Whole, BTreeSet::new()))]))
    }

    /// Returns whether the set of reads grew.
    fn add(&mut self, place: &[Step], extent: Extent, site: Option<&Site>) -> bool {
        let is_new = !self.0.contains_key(place);
        let (held, sites) = self.0.entry(place.to_vec()).or_insert((extent, BTreeSet::new()));
        let is_more = *held < extent;
        if is_more {
            *held = extent;
            if site.is_some() {
                sites.clear();
            }
        }
        if *held == extent && sites.len() < SITES_MAX {
            sites.extend(site.cloned());
        }
        is_new || is_more
    }
}

/// Abstract value; by default none.
#[derive(Clone, Default, PartialEq, Eq)]
struct Flow {
    places: BTreeSet<Place>,
    /// Possible strings.
    texts: BTreeSet<Arc<str>>,
    /// Whether other values are possible.
    mixed: bool,
    /// Elements, if the policy built the value.
    elements: Option<Box<Flow>>,
    /// Whether it may be an array or object, not only a set.
    keyed: bool,
}

impl Flow {
    fn other() -> Self {
        Self { mixed: true, ..Self::default() }
    }

    fn built(elements: Self, keyed: bool) -> Self {
        Self { elements: Some(Box::new(elements)), keyed, ..Self::default() }
    }

    fn is_text(&self) -> bool {
        self.places.is_empty() && !self.mixed && self.elements.is_none()
    }

    /// Returns possible segments of a lookup by this value.
    fn steps(&self) -> Vec<Step> {
        if self.is_text() { self.texts.iter().cloned().map(Step::Name).collect() } else { vec![Step::Any] }
    }

    /// Returns the keys of a scan. Set members were read on insertion.
    fn keys(&self) -> Self {
        if self.mixed || self.keyed || !self.places.is_empty() {
            return Self::other();
        }
        match &self.elements {
            Some(members) if members.is_text() => Self { texts: members.texts.clone(), ..Self::default() },
            Some(_) => Self::other(),
            None => Self::default(),
        }
    }

    /// Whether all paths can be objects of one resource.
    fn is_of_one_resource(&self) -> bool {
        let Some((first, len)) = self.places.first().map(|place| (place, place.len())) else { return false };
        let is_alike = |place: &Place| place.len() == len && place[..len - 1] == first[..len - 1];
        let is_name = |step: &Step| matches!(step, Step::Name(_));
        len >= 3 && first[..len - 2].iter().all(is_name) && self.places.iter().all(is_alike)
    }

    fn size(&self) -> usize {
        1 + self.places.len()
            + self.texts.len()
            + self.elements.as_ref().map_or(0, |elements| elements.size())
    }

    fn stored(&self) -> usize {
        let below = self.elements.as_ref().map_or(0, |elements| elements.stored());
        self.places.iter().map(Vec::len).sum::<usize>() + self.texts.len() + below
    }

    fn is_empty(&self) -> bool {
        self.places.is_empty() && self.elements.as_ref().is_none_or(|elements| elements.is_empty())
    }

    /// Changes if [`join`](Self::join) changes more than elements.
    fn outline(&self) -> (usize, usize, bool, bool, bool) {
        (self.places.len(), self.texts.len(), self.mixed, self.keyed, self.elements.is_some())
    }

    /// Merges `other`. Returns whether anything changed. The caller must read deeply all `escaped` paths.
    fn join(&mut self, other: &Self, depth: usize, lost: &mut BTreeSet<Place>) -> bool {
        let before = self.outline();
        let mut news = false;
        self.places.extend(other.places.iter().cloned());
        self.texts.extend(other.texts.iter().cloned());
        self.mixed |= other.mixed;
        self.keyed |= other.keyed;
        if let Some(elements) = &other.elements {
            if depth < NESTING_MAX {
                news = self.elements.get_or_insert_default().join(elements, depth + 1, lost);
            } else {
                elements.all_places(lost);
                self.mixed = true;
            }
        }
        if self.mixed || self.texts.len() > TEXTS_MAX {
            self.mixed = true;
            self.texts.clear();
        }
        news || self.outline() != before
    }

    fn all_places(&self, into: &mut BTreeSet<Place>) {
        into.extend(self.places.iter().cloned());
        if let Some(elements) = &self.elements {
            elements.all_places(into);
        }
    }
}

pub(crate) fn reads(plan: &Plan) -> Result<Reads, TooComplex> {
    let mut pass = Pass {
        plan,
        functions: plan.functions(),
        flows: HashMap::new(),
        begun: HashMap::new(),
        lists: HashMap::new(),
        changed: Vec::new(),
        depth: 0,
        returns: HashMap::new(),
        returned: BTreeMap::new(),
        reads: Reads::default(),
        once: HashMap::new(),
        scans: 0,
        work: 0,
        stored: 0,
        is_over: false,
        news: false,
    };
    loop {
        pass.news = false;
        for (at, blocks) in plan.entries().enumerate() {
            let scope = format!("entrypoint {at}");
            pass.set((scope.clone(), 0, 0), &Flow::other());
            pass.set((scope.clone(), 1, 0), &data());
            pass.body(&scope, blocks);
        }
        let mut functions: Vec<&Function> = pass.functions.values().copied().collect();
        functions.sort_unstable_by_key(|function| &function.name);
        for function in functions {
            pass.body(&function.name, &function.blocks);
        }
        if pass.is_over() {
            return Err(TooComplex);
        }
        if !pass.news {
            return Ok(pass.reads);
        }
    }
}

fn data() -> Flow {
    Flow { places: BTreeSet::from([Vec::new()]), ..Flow::default() }
}

/// Function, local and the block that first assigns it, 0 for parameters. Definitions of one rule reuse
/// numbers.
type Local = (String, u32, usize);

#[derive(Clone)]
struct List {
    /// Depth of the creating block.
    depth: usize,
    /// Possible segments of each element.
    steps: Vec<Vec<Step>>,
}

struct Pass<'a> {
    plan: &'a Plan,
    functions: HashMap<&'a str, &'a Function>,
    flows: HashMap<Local, Flow>,
    /// First-assigning blocks of the current function.
    begun: HashMap<u32, usize>,
    lists: HashMap<u32, List>,
    /// Lists touched in open blocks, in order.
    changed: Vec<u32>,
    depth: usize,
    returns: HashMap<String, Flow>,
    /// First rule that returns each path.
    returned: BTreeMap<Place, Site>,
    reads: Reads,
    /// The only assignment or insertion of a local. `None` if there are several.
    once: HashMap<Local, Option<*const Stmt>>,
    scans: usize,
    work: usize,
    stored: usize,
    is_over: bool,
    /// Whether the current iteration changed anything.
    news: bool,
}

impl Pass<'_> {
    /// Whether the result is unusable.
    fn is_over(&self) -> bool {
        self.is_over
            || self.work > WORK_MAX
            || self.stored > STORED_STEPS_MAX
            || self.reads.0.len() > PLACES_MAX
    }

    /// Analyses a function. A block that assigns a local before any use starts a new generation.
    fn body(&mut self, scope: &str, blocks: &[Block]) {
        self.begun.clear();
        for (at, block) in blocks.iter().enumerate() {
            let (mut mentioned, mut begun) = (BTreeSet::new(), BTreeSet::new());
            self.mentions(block, &mut mentioned, &mut begun);
            self.begun.extend(begun.into_iter().map(|local| (local, at + 1)));
            self.blocks(scope, std::slice::from_ref(block));
        }
    }

    fn mentions(&self, block: &Block, mentioned: &mut BTreeSet<u32>, begun: &mut BTreeSet<u32>) {
        for stmt in &block.stmts {
            mentioned.extend(self.plan.uses(stmt));
            for target in stmt.targets() {
                if mentioned.insert(target) {
                    begun.insert(target);
                }
            }
            for block in &stmt.blocks {
                self.mentions(block, mentioned, begun);
            }
        }
    }

    fn local(&self, scope: &str, local: u32) -> Local {
        (scope.to_owned(), local, self.begun.get(&local).copied().unwrap_or_default())
    }

    fn blocks(&mut self, scope: &str, blocks: &[Block]) {
        for block in blocks {
            let first = self.changed.len();
            self.depth += 1;
            for stmt in &block.stmts {
                self.work += 1;
                if self.is_over() {
                    return;
                }
                self.build(scope, stmt);
                self.stmt(scope, stmt);
            }
            self.depth -= 1;
            // Blocks may stop early, so their lists are unknown afterwards.
            self.work += self.changed.len() - first;
            for local in &self.changed[first..] {
                self.lists.remove(local);
            }
            if self.depth == 0 {
                self.changed.clear();
            }
        }
    }

    fn build(&mut self, scope: &str, stmt: &Stmt) {
        let plan = self.plan;
        let depth = self.depth;
        let made = match stmt.kind.as_str() {
            "MakeArrayStmt" | "MakeSetStmt" => Some(Vec::new()),
            "AssignVarStmt" => self.list(plan.operand(stmt, "source")),
            _ => None,
        };
        for target in stmt.targets() {
            if self.lists.remove(&target).is_some() {
                self.changed.push(target);
            }
        }
        if let (Some(steps), Some(target)) = (made, stmt.local("target")) {
            self.work += steps.len();
            self.changed.push(target);
            self.lists.insert(target, List { depth, steps });
        }
        let grown = match stmt.kind.as_str() {
            "ArrayAppendStmt" => stmt.local("array"),
            "SetAddStmt" => stmt.local("set"),
            _ => None,
        };
        if let Some((local, mut list)) = grown.and_then(|local| self.lists.remove_entry(&local)) {
            self.changed.push(local);
            // Inner blocks may repeat.
            if list.depth == depth && list.steps.len() < LIST_MAX {
                list.steps.push(self.flow(scope, plan.operand(stmt, "value")).steps());
                self.lists.insert(local, list);
            }
        }
    }

    /// Returns each element's possible segments, if known.
    fn list(&self, operand: Option<Operand>) -> Option<Vec<Vec<Step>>> {
        match operand {
            Some(Operand::Local(local)) => self.lists.get(&local).map(|list| list.steps.clone()),
            _ => None,
        }
    }

    fn stmt(&mut self, scope: &str, stmt: &Stmt) {
        let plan = self.plan;
        let site = plan.site(stmt);
        let flow = |pass: &mut Self, name: &str| pass.flow(scope, plan.operand(stmt, name));
        match stmt.kind.as_str() {
            "NopStmt" | "BreakStmt" | "ResetLocalStmt" | "IsArrayStmt" | "IsObjectStmt" | "IsSetStmt"
            | "IsDefinedStmt" | "IsUndefinedStmt" => {}
            "MakeNullStmt" | "MakeNumberIntStmt" | "MakeNumberRefStmt" | "AssignIntStmt" => {
                self.assign(scope, stmt, "target", &Flow::other());
            }
            "MakeArrayStmt" | "MakeObjectStmt" | "MakeSetStmt" => {
                let empty = Flow::built(Flow::default(), stmt.kind != "MakeSetStmt");
                self.assign(scope, stmt, "target", &empty);
            }
            "AssignVarStmt" | "AssignVarOnceStmt" => {
                let source = flow(self, "source");
                self.assign(scope, stmt, "target", &source);
                if stmt.kind == "AssignVarOnceStmt" && self.may_repeat(scope, stmt, "target") {
                    let all = flow(self, "target");
                    self.compare(&all);
                }
            }
            "DotStmt" => {
                let (source, key) = (flow(self, "source"), flow(self, "key"));
                self.whole(&key, site.as_ref());
                let target = self.dot(&source, &key.steps(), site.as_ref());
                self.assign(scope, stmt, "target", &target);
            }
            "ScanStmt" => {
                let source = flow(self, "source");
                let value = self.dot(&source, &[Step::Any], site.as_ref());
                self.assign(scope, stmt, "key", &source.keys());
                self.assign(scope, stmt, "value", &value);
                self.scans += 1;
                self.blocks(scope, &stmt.blocks);
                self.scans -= 1;
            }
            "LenStmt" => {
                let source = flow(self, "source");
                self.dot(&source, &[Step::Any], site.as_ref());
                self.assign(scope, stmt, "target", &Flow::other());
            }
            "EqualStmt" | "NotEqualStmt" => self.equal(scope, stmt, site.as_ref()),
            "ArrayAppendStmt" => self.put(scope, stmt, "array"),
            "SetAddStmt" => {
                // The lookup has a better location.
                let value = flow(self, "value");
                self.whole(&value, None);
                self.put(scope, stmt, "set");
            }
            "ObjectInsertStmt" | "ObjectInsertOnceStmt" => {
                let key = flow(self, "key");
                self.whole(&key, site.as_ref());
                self.put(scope, stmt, "object");
                if stmt.kind == "ObjectInsertOnceStmt" && self.may_repeat(scope, stmt, "object") {
                    let all = flow(self, "object");
                    all.elements.iter().for_each(|elements| self.compare(elements));
                }
            }
            "ObjectMergeStmt" => {
                let mut merged = flow(self, "a");
                let mut lost = BTreeSet::new();
                merged.join(&flow(self, "b"), 0, &mut lost);
                self.lose(lost);
                merged.texts.clear();
                merged.mixed = true;
                self.assign(scope, stmt, "target", &merged);
            }
            "BlockStmt" | "NotStmt" => self.blocks(scope, &stmt.blocks),
            "WithStmt" => {
                let value = flow(self, "value");
                if stmt.has_path() {
                    // Reads of the replaced path are recorded separately.
                    self.whole(&value, site.as_ref());
                } else {
                    self.assign(scope, stmt, "local", &value);
                }
                self.blocks(scope, &stmt.blocks);
            }
            "CallStmt" => self.call(scope, stmt, site.as_ref()),
            "ReturnLocalStmt" => self.returned(scope, stmt, site),
            "ResultSetAddStmt" => {
                let value = flow(self, "value");
                self.whole(&value, site.as_ref());
            }
            // Dynamic calls and newer statements.
            _ => {
                self.whole(&data(), site.as_ref());
                self.blocks(scope, &stmt.blocks);
            }
        }
    }

    fn equal(&mut self, scope: &str, stmt: &Stmt, site: Option<&Site>) {
        let sides = ["a", "b"].map(|side| self.plan.operand(stmt, side));
        let is_scalar = |side: &Option<Operand>| matches!(side, Some(Operand::Text(_) | Operand::Bool(_)));
        // Such comparisons read no elements.
        if !sides.iter().any(is_scalar) {
            for side in sides {
                let value = self.flow(scope, side);
                self.whole(&value, site);
            }
        }
    }

    fn returned(&mut self, scope: &str, stmt: &Stmt, site: Option<Site>) {
        let source = self.flow(scope, self.plan.operand(stmt, "source"));
        let returned = self.returns.entry(scope.to_owned()).or_default();
        let mut lost = BTreeSet::new();
        self.news |= returned.join(&source, 0, &mut lost);
        self.is_over |= returned.size() > FLOW_PLACES_MAX;
        self.lose(lost);
        if let Some(site) = site {
            for place in source.places {
                self.returned.entry(place).or_insert_with(|| site.clone());
            }
        }
    }

    fn call(&mut self, scope: &str, stmt: &Stmt, site: Option<&Site>) {
        let name = stmt.text("func").unwrap_or_default();
        let operands = self.plan.operands(stmt, "args");
        let args: Vec<Flow> = operands.iter().map(|operand| self.flow(scope, Some(*operand))).collect();
        if let Some(function) = self.functions.get(name).copied() {
            if function.params.len() != args.len() {
                // Malformed plan.
                self.whole(&data(), site);
            }
            for (param, arg) in function.params.iter().zip(&args) {
                self.set((name.to_owned(), *param, 0), arg);
            }
            let result = self.returns.get(name).cloned().unwrap_or_default();
            self.work += result.size();
            self.assign(scope, stmt, "result", &result);
            return;
        }
        let result = match (name, &args[..]) {
            ("object.get", [object, key, default]) => {
                self.whole(key, site);
                // An array is a path.
                let one_name = || key.is_text().then(|| vec![key.steps()]);
                if let Some(path) = self.list(operands.get(1).copied()).or_else(one_name) {
                    let mut result = object.clone();
                    for steps in path {
                        result = self.dot(&result, &steps, site);
                    }
                    let mut lost = BTreeSet::new();
                    result.join(default, 0, &mut lost);
                    self.lose(lost);
                    result
                } else {
                    self.whole(object, site);
                    self.whole(default, site);
                    Flow::other()
                }
            }
            ("json.filter" | "object.filter", [object, kept]) => {
                self.whole(kept, site);
                match self.list(operands.get(1).copied()).and_then(names) {
                    None => self.whole(object, site),
                    Some(paths) => {
                        for path in paths {
                            let place = match name {
                                "json.filter" => pointer(&path),
                                _ => vec![path],
                            };
                            let mut part = object.clone();
                            for step in place {
                                part = self.dot(&part, &[Step::Name(step)], site);
                            }
                            self.whole(&part, site);
                        }
                    }
                }
                Flow::other()
            }
            // Earlier steps read the type.
            (
                "is_array" | "is_boolean" | "is_null" | "is_number" | "is_object" | "is_set" | "is_string"
                | "type_name",
                [_],
            ) => Flow::other(),
            ("count" | "object.keys", [source]) => {
                self.dot(source, &[Step::Any], site);
                Flow::other()
            }
            _ => {
                for arg in &args {
                    self.whole(arg, site);
                }
                Flow::other()
            }
        };
        self.assign(scope, stmt, "result", &result);
    }

    fn lose(&mut self, lost: BTreeSet<Place>) {
        for place in lost {
            self.news |= self.reads.add(&place, Extent::Whole, None);
        }
    }

    /// Follows each of `steps` and records at least a shallow read.
    fn dot(&mut self, source: &Flow, steps: &[Step], site: Option<&Site>) -> Flow {
        let mut target = Flow { mixed: source.mixed, ..Flow::default() };
        let places = source.places.len() * steps.len();
        self.work += places;
        if places > FLOW_PLACES_MAX {
            self.is_over = true;
            return target;
        }
        for place in &source.places {
            for step in steps {
                let mut below = place.clone();
                if below.len() < STEPS_MAX {
                    below.push(step.clone());
                    self.news |= self.reads.add(&below, Extent::Shallow, site);
                } else {
                    self.news |= self.reads.add(&below, Extent::Whole, site);
                }
                target.places.insert(below);
            }
        }
        if let Some(elements) = &source.elements {
            let mut lost = BTreeSet::new();
            target.join(elements, 0, &mut lost);
            self.lose(lost);
        }
        target
    }

    /// Whether the statement can assign twice.
    fn may_repeat(&mut self, scope: &str, stmt: &Stmt, name: &str) -> bool {
        let Some(local) = stmt.local(name) else { return true };
        let this = std::ptr::from_ref(stmt);
        let first = self.once.entry(self.local(scope, local)).or_insert(Some(this));
        if *first != Some(this) {
            *first = None;
        }
        self.scans > 0 || first.is_none()
    }

    fn compare(&mut self, flow: &Flow) {
        if flow.mixed || !flow.texts.is_empty() || flow.elements.is_some() || !flow.is_of_one_resource() {
            return self.whole(flow, None);
        }
        for place in &flow.places {
            self.news |= self.reads.add(place, Extent::Identity, None);
        }
    }

    fn whole(&mut self, flow: &Flow, site: Option<&Site>) {
        self.work += flow.places.len();
        for place in &flow.places {
            // Results of entrypoints have no location.
            let site = site.or_else(|| self.returned.get(place));
            self.news |= self.reads.add(place, Extent::Whole, site);
        }
        if let Some(elements) = &flow.elements {
            self.whole(elements, site);
        }
    }

    fn flow(&mut self, scope: &str, operand: Option<Operand>) -> Flow {
        let flow = match operand {
            Some(Operand::Local(local)) => match self.flows.get(&self.local(scope, local)) {
                Some(flow) => flow.clone(),
                // No caller yet.
                None if self.is_param(scope, local) => Flow::default(),
                None => Flow::other(),
            },
            Some(Operand::Text(text)) => Flow { texts: BTreeSet::from([text.into()]), ..Flow::default() },
            _ => Flow::other(),
        };
        self.work += flow.size();
        flow
    }

    fn is_param(&self, scope: &str, local: u32) -> bool {
        self.functions.get(scope).is_some_and(|function| function.params.contains(&local))
    }

    fn assign(&mut self, scope: &str, stmt: &Stmt, name: &str, flow: &Flow) {
        match stmt.local(name) {
            Some(local) => self.set(self.local(scope, local), flow),
            None if flow.is_empty() => {}
            // Malformed plan.
            None => self.whole(flow, None),
        }
    }

    fn set(&mut self, local: Local, flow: &Flow) {
        let mut lost = BTreeSet::new();
        self.work += flow.size();
        match self.flows.entry(local) {
            Entry::Vacant(place) => {
                place.insert(flow.clone());
                self.news = true;
                self.stored += flow.stored();
            }
            Entry::Occupied(mut held) => {
                let held = held.get_mut();
                if held.join(flow, 0, &mut lost) {
                    self.news = true;
                    self.stored += flow.stored();
                    self.is_over |= held.size() > FLOW_PLACES_MAX;
                }
            }
        }
        self.lose(lost);
    }

    fn put(&mut self, scope: &str, stmt: &Stmt, container: &str) {
        let (mut elements, mut lost) = (Flow::default(), BTreeSet::new());
        let value = self.flow(scope, self.plan.operand(stmt, "value"));
        elements.join(&value, 1, &mut lost);
        match stmt.local(container) {
            Some(local) => {
                let built = Flow::built(elements, container != "set");
                let local = self.local(scope, local);
                self.set(local, &built);
            }
            None => self.whole(&elements, None),
        }
        self.lose(lost);
    }
}

/// Returns the names in `list`. `None` if some are dynamic.
fn names(list: Vec<Vec<Step>>) -> Option<Vec<Arc<str>>> {
    let name = |step| match step {
        Step::Name(name) => Some(name),
        Step::Any => None,
    };
    list.into_iter().flatten().map(name).collect()
}

/// Parses a path like OPA (v1/topdown/json.go, `parsePath`): leading slashes are optional; the empty path is
/// the complete value.
fn pointer(path: &str) -> Vec<Arc<str>> {
    let names = (!path.is_empty()).then(|| path.trim_start_matches('/').split('/'));
    names.into_iter().flatten().map(|name| name.replace("~1", "/").replace("~0", "~").into()).collect()
}

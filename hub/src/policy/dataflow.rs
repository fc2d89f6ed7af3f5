//! Data-flow analysis of OPA's plan: finds the paths below `data` that policies can read.
//!
//! The abstract value of a local has all paths and strings that may reach it. A step by a known string reads
//! that field only. Compared, returned, printed and otherwise unmodelled values are read deeply. Unknown
//! statements read everything.
//!
//! OPA also compares set members, and values that are assigned twice. Two objects of one resource are equal
//! only if their identities are.
//!
//! `object.get` with a key that may not be a string reads its object deeply: OPA accepts an array there as a path.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use opa_hub_proto::path::DirPath;

use crate::policy::plan::{Block, Function, Operand, Plan, Site, Stmt};

/// Maximum path length, for malformed plans.
const STEPS_MAX: usize = 32;
/// Maximum number of paths read; a hundred policies read a few hundred.
const PLACES_MAX: usize = 20_000;
/// Maximum number of paths per value. Six names at twelve levels make 6¹² paths.
const VALUE_PLACES_MAX: usize = 4096;
/// Maximum total path length: about 50 MB.
const STORED_STEPS_MAX: usize = 1_000_000;
/// Maximum number of paths and statements visited: under 2 s.
const VISITS_MAX: usize = 4_000_000;
/// Maximum nesting of tracked containers.
const NESTING_MAX: usize = 8;
/// Maximum number of strings per value. Longer lists are not field names.
const STRINGS_MAX: usize = 64;
/// Maximum length of a tracked list.
const LIST_MAX: usize = 256;
/// Fields that differ between any two objects.
const IDENTITY: [&[&str]; 4] =
    [&["apiVersion"], &["kind"], &["metadata", "name"], &["metadata", "namespace"]];

/// One segment of a path.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Segment {
    /// This key.
    Key(Arc<str>),
    /// Any key or index.
    Wildcard,
}

/// A path below `data`.
pub type Place = Vec<Segment>;

/// Depth of a read.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum ReadDepth {
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
pub struct ReadSet(BTreeMap<Place, (ReadDepth, BTreeSet<Site>)>);

/// The analysis exceeded its bounds.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("field analysis failed: the policies choose among too many fields; read fields by constant names")]
pub(crate) struct TooComplex;

impl ReadSet {
    /// Creates reads located at `sites`.
    pub fn of(places: impl IntoIterator<Item = (Place, ReadDepth)>, sites: &[Site]) -> Self {
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

    /// Returns the paths read in objects `depth` levels below `place`, with [`ReadDepth::Identity`] expanded. An
    /// empty deep path means complete objects.
    pub fn of_objects(
        &self,
        place: &DirPath,
        depth: usize,
    ) -> Vec<(Vec<Segment>, ReadDepth, &BTreeSet<Site>)> {
        let resource = place.relative().split('/').count();
        let is_name = |step: &Segment| matches!(step, Segment::Key(_));
        let mut paths = Vec::new();
        for (read, extent, sites) in self.about(place) {
            match (read.get(resource + depth..), extent) {
                (Some([]), ReadDepth::Identity) if read[..resource].iter().all(is_name) => {
                    let path =
                        |names: &[&str]| names.iter().map(|name| Segment::Key((*name).into())).collect();
                    paths.extend(IDENTITY.map(|names| (path(names), ReadDepth::Shallow, sites)));
                }
                (Some(steps), ReadDepth::Shallow) => paths.push((steps.to_vec(), ReadDepth::Shallow, sites)),
                (Some(steps), _) => paths.push((steps.to_vec(), ReadDepth::Whole, sites)),
                (None, ReadDepth::Shallow) => {}
                (None, _) => paths.push((Vec::new(), ReadDepth::Whole, sites)),
            }
        }
        paths
    }

    /// Iterates over all reads, sorted.
    pub fn iter(&self) -> impl Iterator<Item = (&Place, ReadDepth, &BTreeSet<Site>)> {
        self.0.iter().map(|(place, (extent, sites))| (place, *extent, sites))
    }

    /// Iterates over reads at, above and below `place`.
    pub fn about(&self, place: &DirPath) -> impl Iterator<Item = (&Place, ReadDepth, &BTreeSet<Site>)> {
        let is_match = |(step, name): (&Segment, &str)| match step {
            Segment::Key(key) => **key == *name,
            Segment::Wildcard => true,
        };
        self.iter().filter(move |(read, ..)| read.iter().zip(place.relative().split('/')).all(is_match))
    }

    /// Returns a deep read of all data, without locations.
    pub fn everything() -> Self {
        Self(BTreeMap::from([(Vec::new(), (ReadDepth::Whole, BTreeSet::new()))]))
    }

    /// Returns whether the set of reads grew.
    fn add(&mut self, place: &[Segment], extent: ReadDepth, site: Option<&Site>) -> bool {
        let is_new = !self.0.contains_key(place);
        let (recorded, sites) = self.0.entry(place.to_vec()).or_insert((extent, BTreeSet::new()));
        let is_deeper = *recorded < extent;
        if is_deeper {
            *recorded = extent;
            if site.is_some() {
                sites.clear();
            }
        }
        if *recorded == extent && sites.len() < SITES_MAX {
            sites.extend(site.cloned());
        }
        is_new || is_deeper
    }
}

/// Abstract value. The default means no value.
#[derive(Clone, Default, PartialEq, Eq)]
struct AbstractValue {
    places: BTreeSet<Place>,
    strings: BTreeSet<Arc<str>>,
    /// Whether other values are possible.
    may_be_other: bool,
    /// Elements, if the policy built the value.
    elements: Option<Box<AbstractValue>>,
    /// Whether it may be an array or object, not only a set.
    is_keyed: bool,
}

impl AbstractValue {
    fn unknown() -> Self {
        Self { may_be_other: true, ..Self::default() }
    }

    fn container(elements: Self, is_keyed: bool) -> Self {
        Self { elements: Some(Box::new(elements)), is_keyed, ..Self::default() }
    }

    fn is_string(&self) -> bool {
        self.places.is_empty() && !self.may_be_other && self.elements.is_none()
    }

    /// Returns possible segments of a lookup by this value.
    fn steps(&self) -> Vec<Segment> {
        if self.is_string() {
            self.strings.iter().cloned().map(Segment::Key).collect()
        } else {
            vec![Segment::Wildcard]
        }
    }

    /// Returns the keys of a scan. Set members were read on insertion.
    fn keys(&self) -> Self {
        if self.may_be_other || self.is_keyed || !self.places.is_empty() {
            return Self::unknown();
        }
        match &self.elements {
            Some(members) if members.is_string() => {
                Self { strings: members.strings.clone(), ..Self::default() }
            }
            Some(_) => Self::unknown(),
            None => Self::default(),
        }
    }

    /// Whether all paths can be objects of one resource.
    fn is_of_one_resource(&self) -> bool {
        let Some((first, len)) = self.places.first().map(|place| (place, place.len())) else { return false };
        let is_alike = |place: &Place| place.len() == len && place[..len - 1] == first[..len - 1];
        let is_name = |step: &Segment| matches!(step, Segment::Key(_));
        len >= 3 && first[..len - 2].iter().all(is_name) && self.places.iter().all(is_alike)
    }

    fn size(&self) -> usize {
        1 + self.places.len()
            + self.strings.len()
            + self.elements.as_ref().map_or(0, |elements| elements.size())
    }

    fn stored_steps(&self) -> usize {
        let below = self.elements.as_ref().map_or(0, |elements| elements.stored_steps());
        self.places.iter().map(Vec::len).sum::<usize>() + self.strings.len() + below
    }

    fn is_empty(&self) -> bool {
        self.places.is_empty() && self.elements.as_ref().is_none_or(|elements| elements.is_empty())
    }

    /// Changes if [`join`](Self::join) changes more than elements.
    fn shape(&self) -> (usize, usize, bool, bool, bool) {
        (self.places.len(), self.strings.len(), self.may_be_other, self.is_keyed, self.elements.is_some())
    }

    /// Merges `other`. Returns whether anything changed. The caller must read deeply all `escaped` paths.
    fn join(&mut self, other: &Self, depth: usize, escaped: &mut BTreeSet<Place>) -> bool {
        let before = self.shape();
        let mut changed = false;
        self.places.extend(other.places.iter().cloned());
        self.strings.extend(other.strings.iter().cloned());
        self.may_be_other |= other.may_be_other;
        self.is_keyed |= other.is_keyed;
        if let Some(elements) = &other.elements {
            if depth < NESTING_MAX {
                changed = self.elements.get_or_insert_default().join(elements, depth + 1, escaped);
            } else {
                elements.collect_places(escaped);
                self.may_be_other = true;
            }
        }
        if self.may_be_other || self.strings.len() > STRINGS_MAX {
            self.may_be_other = true;
            self.strings.clear();
        }
        changed || self.shape() != before
    }

    fn collect_places(&self, into: &mut BTreeSet<Place>) {
        into.extend(self.places.iter().cloned());
        if let Some(elements) = &self.elements {
            elements.collect_places(into);
        }
    }
}

pub(crate) fn reads(plan: &Plan) -> Result<ReadSet, TooComplex> {
    let mut analysis = Analysis {
        plan,
        functions: plan.functions(),
        values: HashMap::new(),
        generations: HashMap::new(),
        lists: HashMap::new(),
        touched_lists: Vec::new(),
        depth: 0,
        returns: HashMap::new(),
        return_sites: BTreeMap::new(),
        reads: ReadSet::default(),
        single_assignments: HashMap::new(),
        loop_depth: 0,
        visits: 0,
        stored_steps: 0,
        has_too_many_places: false,
        changed: false,
    };
    loop {
        analysis.changed = false;
        for (index, blocks) in plan.entries().enumerate() {
            let scope = format!("entrypoint {index}");
            analysis.update((scope.clone(), 0, 0), &AbstractValue::unknown());
            analysis.update((scope.clone(), 1, 0), &data());
            analysis.visit_function(&scope, blocks);
        }
        let mut functions: Vec<&Function> = analysis.functions.values().copied().collect();
        functions.sort_unstable_by_key(|function| &function.name);
        for function in functions {
            analysis.visit_function(&function.name, &function.blocks);
        }
        if analysis.is_exhausted() {
            return Err(TooComplex);
        }
        if !analysis.changed {
            return Ok(analysis.reads);
        }
    }
}

fn data() -> AbstractValue {
    AbstractValue { places: BTreeSet::from([Vec::new()]), ..AbstractValue::default() }
}

/// Function, local and the block that first assigns it, 0 for parameters. Definitions of one rule reuse
/// numbers.
type Local = (String, u32, usize);

#[derive(Clone)]
struct TrackedList {
    /// Depth of the block that creates the list.
    depth: usize,
    /// Possible segments of each element.
    steps: Vec<Vec<Segment>>,
}

struct Analysis<'a> {
    plan: &'a Plan,
    functions: HashMap<&'a str, &'a Function>,
    values: HashMap<Local, AbstractValue>,
    /// First-assigning blocks of the current function.
    generations: HashMap<u32, usize>,
    lists: HashMap<u32, TrackedList>,
    /// Lists touched in open blocks, in order.
    touched_lists: Vec<u32>,
    depth: usize,
    returns: HashMap<String, AbstractValue>,
    /// First rule that returns each path.
    return_sites: BTreeMap<Place, Site>,
    reads: ReadSet,
    /// The only assignment or insertion of a local. `None` if there are several.
    single_assignments: HashMap<Local, Option<*const Stmt>>,
    loop_depth: usize,
    visits: usize,
    stored_steps: usize,
    has_too_many_places: bool,
    changed: bool,
}

impl Analysis<'_> {
    fn is_exhausted(&self) -> bool {
        self.has_too_many_places
            || self.visits > VISITS_MAX
            || self.stored_steps > STORED_STEPS_MAX
            || self.reads.0.len() > PLACES_MAX
    }

    /// Analyses a function. A block that assigns a local before any use starts a new generation.
    fn visit_function(&mut self, scope: &str, blocks: &[Block]) {
        self.generations.clear();
        for (index, block) in blocks.iter().enumerate() {
            let (mut mentioned, mut assigned_first) = (BTreeSet::new(), BTreeSet::new());
            self.mentions(block, &mut mentioned, &mut assigned_first);
            self.generations.extend(assigned_first.into_iter().map(|local| (local, index + 1)));
            self.visit_blocks(scope, std::slice::from_ref(block));
        }
    }

    fn mentions(&self, block: &Block, mentioned: &mut BTreeSet<u32>, assigned_first: &mut BTreeSet<u32>) {
        for stmt in &block.stmts {
            mentioned.extend(self.plan.uses(stmt));
            for target in stmt.targets() {
                if mentioned.insert(target) {
                    assigned_first.insert(target);
                }
            }
            for block in &stmt.blocks {
                self.mentions(block, mentioned, assigned_first);
            }
        }
    }

    fn local(&self, scope: &str, local: u32) -> Local {
        (scope.to_owned(), local, self.generations.get(&local).copied().unwrap_or_default())
    }

    fn visit_blocks(&mut self, scope: &str, blocks: &[Block]) {
        for block in blocks {
            let first = self.touched_lists.len();
            self.depth += 1;
            for stmt in &block.stmts {
                self.visits += 1;
                if self.is_exhausted() {
                    return;
                }
                self.track_list(scope, stmt);
                self.visit_stmt(scope, stmt);
            }
            self.depth -= 1;
            // Blocks may stop early, so their lists are unknown afterwards.
            self.visits += self.touched_lists.len() - first;
            for local in &self.touched_lists[first..] {
                self.lists.remove(local);
            }
            if self.depth == 0 {
                self.touched_lists.clear();
            }
        }
    }

    fn track_list(&mut self, scope: &str, stmt: &Stmt) {
        let plan = self.plan;
        let depth = self.depth;
        let made = match stmt.kind.as_str() {
            "MakeArrayStmt" | "MakeSetStmt" => Some(Vec::new()),
            "AssignVarStmt" => self.list_segments(plan.operand(stmt, "source")),
            _ => None,
        };
        for target in stmt.targets() {
            if self.lists.remove(&target).is_some() {
                self.touched_lists.push(target);
            }
        }
        if let (Some(steps), Some(target)) = (made, stmt.local("target")) {
            self.visits += steps.len();
            self.touched_lists.push(target);
            self.lists.insert(target, TrackedList { depth, steps });
        }
        let grown = match stmt.kind.as_str() {
            "ArrayAppendStmt" => stmt.local("array"),
            "SetAddStmt" => stmt.local("set"),
            _ => None,
        };
        if let Some((local, mut list)) = grown.and_then(|local| self.lists.remove_entry(&local)) {
            self.touched_lists.push(local);
            // Inner blocks may repeat.
            if list.depth == depth && list.steps.len() < LIST_MAX {
                list.steps.push(self.value(scope, plan.operand(stmt, "value")).steps());
                self.lists.insert(local, list);
            }
        }
    }

    /// Returns each element's possible segments, if known.
    fn list_segments(&self, operand: Option<Operand>) -> Option<Vec<Vec<Segment>>> {
        match operand {
            Some(Operand::Local(local)) => self.lists.get(&local).map(|list| list.steps.clone()),
            _ => None,
        }
    }

    fn visit_stmt(&mut self, scope: &str, stmt: &Stmt) {
        let plan = self.plan;
        let site = plan.site(stmt);
        let operand = |analysis: &mut Self, name: &str| analysis.value(scope, plan.operand(stmt, name));
        match stmt.kind.as_str() {
            "NopStmt" | "BreakStmt" | "ResetLocalStmt" | "IsArrayStmt" | "IsObjectStmt" | "IsSetStmt"
            | "IsDefinedStmt" | "IsUndefinedStmt" => {}
            "MakeNullStmt" | "MakeNumberIntStmt" | "MakeNumberRefStmt" | "AssignIntStmt" => {
                self.assign(scope, stmt, "target", &AbstractValue::unknown());
            }
            "MakeArrayStmt" | "MakeObjectStmt" | "MakeSetStmt" => {
                let empty = AbstractValue::container(AbstractValue::default(), stmt.kind != "MakeSetStmt");
                self.assign(scope, stmt, "target", &empty);
            }
            "AssignVarStmt" | "AssignVarOnceStmt" => {
                let source = operand(self, "source");
                self.assign(scope, stmt, "target", &source);
                if stmt.kind == "AssignVarOnceStmt" && self.may_repeat(scope, stmt, "target") {
                    let all = operand(self, "target");
                    self.compare(&all);
                }
            }
            "DotStmt" => {
                let (source, key) = (operand(self, "source"), operand(self, "key"));
                self.read_deep(&key, site.as_ref());
                let target = self.step_into(&source, &key.steps(), site.as_ref());
                self.assign(scope, stmt, "target", &target);
            }
            "ScanStmt" => {
                let source = operand(self, "source");
                let value = self.step_into(&source, &[Segment::Wildcard], site.as_ref());
                self.assign(scope, stmt, "key", &source.keys());
                self.assign(scope, stmt, "value", &value);
                self.loop_depth += 1;
                self.visit_blocks(scope, &stmt.blocks);
                self.loop_depth -= 1;
            }
            "LenStmt" => {
                let source = operand(self, "source");
                self.step_into(&source, &[Segment::Wildcard], site.as_ref());
                self.assign(scope, stmt, "target", &AbstractValue::unknown());
            }
            "EqualStmt" | "NotEqualStmt" => self.visit_equal(scope, stmt, site.as_ref()),
            "ArrayAppendStmt" => self.store_into(scope, stmt, "array"),
            "SetAddStmt" => {
                // The lookup has a better location.
                let value = operand(self, "value");
                self.read_deep(&value, None);
                self.store_into(scope, stmt, "set");
            }
            "ObjectInsertStmt" | "ObjectInsertOnceStmt" => {
                let key = operand(self, "key");
                self.read_deep(&key, site.as_ref());
                self.store_into(scope, stmt, "object");
                if stmt.kind == "ObjectInsertOnceStmt" && self.may_repeat(scope, stmt, "object") {
                    let all = operand(self, "object");
                    all.elements.iter().for_each(|elements| self.compare(elements));
                }
            }
            "ObjectMergeStmt" => {
                let mut merged = operand(self, "a");
                let mut escaped = BTreeSet::new();
                merged.join(&operand(self, "b"), 0, &mut escaped);
                self.read_escaped(escaped);
                merged.strings.clear();
                merged.may_be_other = true;
                self.assign(scope, stmt, "target", &merged);
            }
            "BlockStmt" | "NotStmt" => self.visit_blocks(scope, &stmt.blocks),
            "WithStmt" => {
                let value = operand(self, "value");
                if stmt.has_path() {
                    // Reads of the replaced path are recorded separately.
                    self.read_deep(&value, site.as_ref());
                } else {
                    self.assign(scope, stmt, "local", &value);
                }
                self.visit_blocks(scope, &stmt.blocks);
            }
            "CallStmt" => self.visit_call(scope, stmt, site.as_ref()),
            "ReturnLocalStmt" => self.visit_return(scope, stmt, site),
            "ResultSetAddStmt" => {
                let value = operand(self, "value");
                self.read_deep(&value, site.as_ref());
            }
            // Dynamic calls and newer statements.
            _ => {
                self.read_deep(&data(), site.as_ref());
                self.visit_blocks(scope, &stmt.blocks);
            }
        }
    }

    fn visit_equal(&mut self, scope: &str, stmt: &Stmt, site: Option<&Site>) {
        let sides = ["a", "b"].map(|side| self.plan.operand(stmt, side));
        let is_scalar = |side: &Option<Operand>| matches!(side, Some(Operand::Text(_) | Operand::Bool(_)));
        // A comparison with a scalar reads no elements.
        if !sides.iter().any(is_scalar) {
            for side in sides {
                let value = self.value(scope, side);
                self.read_deep(&value, site);
            }
        }
    }

    fn visit_return(&mut self, scope: &str, stmt: &Stmt, site: Option<Site>) {
        let source = self.value(scope, self.plan.operand(stmt, "source"));
        let returned = self.returns.entry(scope.to_owned()).or_default();
        let mut escaped = BTreeSet::new();
        self.changed |= returned.join(&source, 0, &mut escaped);
        self.has_too_many_places |= returned.size() > VALUE_PLACES_MAX;
        self.read_escaped(escaped);
        if let Some(site) = site {
            for place in source.places {
                self.return_sites.entry(place).or_insert_with(|| site.clone());
            }
        }
    }

    fn visit_call(&mut self, scope: &str, stmt: &Stmt, site: Option<&Site>) {
        let name = stmt.text("func").unwrap_or_default();
        let operands = self.plan.operands(stmt, "args");
        let args: Vec<AbstractValue> =
            operands.iter().map(|operand| self.value(scope, Some(*operand))).collect();
        if let Some(function) = self.functions.get(name).copied() {
            if function.params.len() != args.len() {
                // Malformed plan.
                self.read_deep(&data(), site);
            }
            for (param, arg) in function.params.iter().zip(&args) {
                self.update((name.to_owned(), *param, 0), arg);
            }
            let result = self.returns.get(name).cloned().unwrap_or_default();
            self.visits += result.size();
            self.assign(scope, stmt, "result", &result);
            return;
        }
        let result = match (name, &args[..]) {
            ("object.get", [object, key, default]) => {
                self.read_deep(key, site);
                // An array selects a path.
                let one_name = || key.is_string().then(|| vec![key.steps()]);
                if let Some(path) = self.list_segments(operands.get(1).copied()).or_else(one_name) {
                    let mut result = object.clone();
                    for steps in path {
                        result = self.step_into(&result, &steps, site);
                    }
                    let mut escaped = BTreeSet::new();
                    result.join(default, 0, &mut escaped);
                    self.read_escaped(escaped);
                    result
                } else {
                    self.read_deep(object, site);
                    self.read_deep(default, site);
                    AbstractValue::unknown()
                }
            }
            ("json.filter" | "object.filter", [object, filter]) => {
                self.read_deep(filter, site);
                match self.list_segments(operands.get(1).copied()).and_then(names) {
                    None => self.read_deep(object, site),
                    Some(paths) => {
                        for path in paths {
                            let place = match name {
                                "json.filter" => pointer(&path),
                                _ => vec![path],
                            };
                            let mut part = object.clone();
                            for step in place {
                                part = self.step_into(&part, &[Segment::Key(step)], site);
                            }
                            self.read_deep(&part, site);
                        }
                    }
                }
                AbstractValue::unknown()
            }
            // Earlier steps read the type.
            (
                "is_array" | "is_boolean" | "is_null" | "is_number" | "is_object" | "is_set" | "is_string"
                | "type_name",
                [_],
            ) => AbstractValue::unknown(),
            ("count" | "object.keys", [source]) => {
                self.step_into(source, &[Segment::Wildcard], site);
                AbstractValue::unknown()
            }
            _ => {
                for arg in &args {
                    self.read_deep(arg, site);
                }
                AbstractValue::unknown()
            }
        };
        self.assign(scope, stmt, "result", &result);
    }

    fn read_escaped(&mut self, escaped: BTreeSet<Place>) {
        for place in escaped {
            self.changed |= self.reads.add(&place, ReadDepth::Whole, None);
        }
    }

    /// AutoFields each of `steps` and records at least a shallow read.
    fn step_into(&mut self, source: &AbstractValue, steps: &[Segment], site: Option<&Site>) -> AbstractValue {
        let mut target = AbstractValue { may_be_other: source.may_be_other, ..AbstractValue::default() };
        let places = source.places.len() * steps.len();
        self.visits += places;
        if places > VALUE_PLACES_MAX {
            self.has_too_many_places = true;
            return target;
        }
        for place in &source.places {
            for step in steps {
                let mut below = place.clone();
                if below.len() < STEPS_MAX {
                    below.push(step.clone());
                    self.changed |= self.reads.add(&below, ReadDepth::Shallow, site);
                } else {
                    self.changed |= self.reads.add(&below, ReadDepth::Whole, site);
                }
                target.places.insert(below);
            }
        }
        if let Some(elements) = &source.elements {
            let mut escaped = BTreeSet::new();
            target.join(elements, 0, &mut escaped);
            self.read_escaped(escaped);
        }
        target
    }

    /// Whether the statement can assign twice.
    fn may_repeat(&mut self, scope: &str, stmt: &Stmt, name: &str) -> bool {
        let Some(local) = stmt.local(name) else { return true };
        let this = std::ptr::from_ref(stmt);
        let first = self.single_assignments.entry(self.local(scope, local)).or_insert(Some(this));
        if *first != Some(this) {
            *first = None;
        }
        self.loop_depth > 0 || first.is_none()
    }

    fn compare(&mut self, value: &AbstractValue) {
        if value.may_be_other
            || !value.strings.is_empty()
            || value.elements.is_some()
            || !value.is_of_one_resource()
        {
            return self.read_deep(value, None);
        }
        for place in &value.places {
            self.changed |= self.reads.add(place, ReadDepth::Identity, None);
        }
    }

    fn read_deep(&mut self, value: &AbstractValue, site: Option<&Site>) {
        self.visits += value.places.len();
        for place in &value.places {
            // Results of entrypoints have no location.
            let site = site.or_else(|| self.return_sites.get(place));
            self.changed |= self.reads.add(place, ReadDepth::Whole, site);
        }
        if let Some(elements) = &value.elements {
            self.read_deep(elements, site);
        }
    }

    fn value(&mut self, scope: &str, operand: Option<Operand>) -> AbstractValue {
        let value = match operand {
            Some(Operand::Local(local)) => match self.values.get(&self.local(scope, local)) {
                Some(value) => value.clone(),
                // No caller yet.
                None if self.is_param(scope, local) => AbstractValue::default(),
                None => AbstractValue::unknown(),
            },
            Some(Operand::Text(text)) => {
                AbstractValue { strings: BTreeSet::from([text.into()]), ..AbstractValue::default() }
            }
            _ => AbstractValue::unknown(),
        };
        self.visits += value.size();
        value
    }

    fn is_param(&self, scope: &str, local: u32) -> bool {
        self.functions.get(scope).is_some_and(|function| function.params.contains(&local))
    }

    fn assign(&mut self, scope: &str, stmt: &Stmt, name: &str, value: &AbstractValue) {
        match stmt.local(name) {
            Some(local) => self.update(self.local(scope, local), value),
            None if value.is_empty() => {}
            // Malformed plan.
            None => self.read_deep(value, None),
        }
    }

    fn update(&mut self, local: Local, value: &AbstractValue) {
        let mut escaped = BTreeSet::new();
        self.visits += value.size();
        match self.values.entry(local) {
            Entry::Vacant(entry) => {
                entry.insert(value.clone());
                self.changed = true;
                self.stored_steps += value.stored_steps();
            }
            Entry::Occupied(mut entry) => {
                let existing = entry.get_mut();
                if existing.join(value, 0, &mut escaped) {
                    self.changed = true;
                    self.stored_steps += value.stored_steps();
                    self.has_too_many_places |= existing.size() > VALUE_PLACES_MAX;
                }
            }
        }
        self.read_escaped(escaped);
    }

    fn store_into(&mut self, scope: &str, stmt: &Stmt, container: &str) {
        let (mut elements, mut escaped) = (AbstractValue::default(), BTreeSet::new());
        let value = self.value(scope, self.plan.operand(stmt, "value"));
        elements.join(&value, 1, &mut escaped);
        match stmt.local(container) {
            Some(local) => {
                let built = AbstractValue::container(elements, container != "set");
                let local = self.local(scope, local);
                self.update(local, &built);
            }
            None => self.read_deep(&elements, None),
        }
        self.read_escaped(escaped);
    }
}

/// Returns the names in `list`. `None` if some are dynamic.
fn names(list: Vec<Vec<Segment>>) -> Option<Vec<Arc<str>>> {
    let name = |step| match step {
        Segment::Key(name) => Some(name),
        Segment::Wildcard => None,
    };
    list.into_iter().flatten().map(name).collect()
}

/// Parses a path like OPA (v1/topdown/json.go, `parsePath`): leading slashes are optional; the empty path is
/// the complete value.
fn pointer(path: &str) -> Vec<Arc<str>> {
    let names = (!path.is_empty()).then(|| path.trim_start_matches('/').split('/'));
    names.into_iter().flatten().map(|name| name.replace("~1", "/").replace("~0", "~").into()).collect()
}

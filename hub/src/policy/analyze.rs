//! What of the data policies can read, by a data-flow pass over OPA's [`Plan`].
//!
//! Each local stands for the places below `data` that its value may come from. A step into a place is a read of what
//! lies there; whoever takes a value whole (compares, returns, prints it, hands it to a builtin) reads all below it.
//! Nothing is guessed: what the pass does not know reads everything that it is given.
//!
//! Texts are followed too: a step by a name that is one of a few constants reads the fields of these names only.
//!
//! OPA compares whole values in three more places. A set compares its members, so whatever enters a set is read whole.
//! A complete rule and an object compare the values that they get twice: two objects of Kubernetes differ if and only
//! if their identities do, other values are read whole.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use opa_hub_proto::path::DirPath;

use super::plan::{Block, Function, Operand, Plan, Site, Stmt};

/// Steps of one place. Rego forbids recursion, so that paths end; this bounds the cost of a malformed plan.
const STEPS_MAX: usize = 32;
/// Maximum number of places that policies read. A hundred real policies read a few hundred.
const PLACES_MAX: usize = 20_000;
/// Maximum number of places that one value may come from. Names chosen from lists multiply: six names at each of twelve
/// levels are 6¹² places.
const FLOW_PLACES_MAX: usize = 4096;
/// Maximum number of steps of all places of all values: about 50 MB.
const STORED_STEPS_MAX: usize = 1_000_000;
/// Maximum number of places and statements that are looked at: under 2 s in a release build.
const WORK_MAX: usize = 4_000_000;
/// Containers in containers whose elements are followed.
const NESTING_MAX: usize = 8;
/// Maximum number of texts that one value may be. Lists of field names are shorter, lists of images are no names.
const TEXTS_MAX: usize = 64;
/// Maximum number of elements of a list whose positions are followed. Paths are shorter.
const LIST_MAX: usize = 256;
/// Fields in which any two objects of Kubernetes differ, wherever they lie.
const IDENTITY: [&[&str]; 4] =
    [&["apiVersion"], &["kind"], &["metadata", "name"], &["metadata", "namespace"]];

/// One step down.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Step {
    /// By this name.
    Name(Arc<str>),
    /// By some name, or to some element.
    Any,
}

/// A place below `data`.
pub type Place = Vec<Step>;

/// How much is read at a place.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Extent {
    /// Whether there is something, its kind, and the value itself where it is no container.
    Shallow,
    /// Enough to tell two objects of one resource apart.
    Identity,
    /// All that lies below it.
    Whole,
}

/// Readers of a place that are remembered: enough to know where to look.
const SITES_MAX: usize = 8;

/// What is read, and by whom.
#[derive(Clone, Default, Debug)]
pub struct Reads(BTreeMap<Place, (Extent, BTreeSet<Site>)>);

/// The analysis takes more time or memory than it may.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("field analysis failed: the policies choose among too many fields; read fields by constant names")]
pub struct TooComplex;

impl Reads {
    /// These places, each read as far as its extent says, at `sites`.
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

    /// Adds what `other` reads.
    pub fn join(&mut self, other: Self) {
        for (place, (extent, sites)) in other.0 {
            self.add(&place, extent, None);
            for site in &sites {
                self.add(&place, extent, Some(site));
            }
        }
    }

    /// Paths that are read within objects that lie `depth` names below `place`, none of them of the extent `Identity`.
    /// An empty path that is read whole means whole objects.
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

    /// Every place that is read, in their order, with who reads it so.
    pub fn iter(&self) -> impl Iterator<Item = (&Place, Extent, &BTreeSet<Site>)> {
        self.0.iter().map(|(place, (extent, sites))| (place, *extent, sites))
    }

    /// What is read of `place`, of what it lies in, and of what lies in it.
    pub fn about(&self, place: &DirPath) -> impl Iterator<Item = (&Place, Extent, &BTreeSet<Site>)> {
        let may_be = |(step, name): (&Step, &str)| match step {
            Step::Name(held) => **held == *name,
            Step::Any => true,
        };
        self.iter().filter(move |(read, ..)| read.iter().zip(place.relative().split('/')).all(may_be))
    }

    /// All of the data, by nobody in particular.
    pub fn everything() -> Self {
        Self(BTreeMap::from([(Vec::new(), (Extent::Whole, BTreeSet::new()))]))
    }

    /// Says whether the place, or so much of it, was not read before.
    fn add(&mut self, place: &[Step], extent: Extent, site: Option<&Site>) -> bool {
        let is_new = !self.0.contains_key(place);
        let (held, sites) = self.0.entry(place.to_vec()).or_insert((extent, BTreeSet::new()));
        let is_more = *held < extent;
        if is_more {
            *held = extent;
            // Who takes it whole says more than who touches it.
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

/// What a value may be. The default is no value at all.
#[derive(Clone, Default, PartialEq, Eq)]
struct Flow {
    /// Places that it may come from.
    places: BTreeSet<Place>,
    /// Texts that it may be.
    texts: BTreeSet<Arc<str>>,
    /// Whether it may also be any other value that does not lie below `data`.
    mixed: bool,
    /// What its elements may be, when it was built of others.
    elements: Option<Box<Flow>>,
    /// Whether what was built may be an array or an object, not only a set.
    keyed: bool,
}

impl Flow {
    /// A value of which nothing is known but that it does not lie below `data`.
    fn other() -> Self {
        Self { mixed: true, ..Self::default() }
    }

    /// A container of these elements.
    fn built(elements: Self, keyed: bool) -> Self {
        Self { elements: Some(Box::new(elements)), keyed, ..Self::default() }
    }

    /// Whether it can only be one of its texts.
    fn is_text(&self) -> bool {
        self.places.is_empty() && !self.mixed && self.elements.is_none()
    }

    /// The steps that it may be as a key.
    fn steps(&self) -> Vec<Step> {
        if self.is_text() { self.texts.iter().cloned().map(Step::Name).collect() } else { vec![Step::Any] }
    }

    /// The keys that a scan of it finds. Those of a set are its members, which were read whole when they came.
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

    /// Whether all places can be objects of one resource: they differ in their last step only.
    fn is_of_one_resource(&self) -> bool {
        let Some((first, len)) = self.places.first().map(|place| (place, place.len())) else { return false };
        let is_alike = |place: &Place| place.len() == len && place[..len - 1] == first[..len - 1];
        let is_name = |step: &Step| matches!(step, Step::Name(_));
        len >= 3 && first[..len - 2].iter().all(is_name) && self.places.iter().all(is_alike)
    }

    /// Places, texts and containers.
    fn size(&self) -> usize {
        1 + self.places.len()
            + self.texts.len()
            + self.elements.as_ref().map_or(0, |elements| elements.size())
    }

    /// Steps of all its places, and its texts.
    fn stored(&self) -> usize {
        let below = self.elements.as_ref().map_or(0, |elements| elements.stored());
        self.places.iter().map(Vec::len).sum::<usize>() + self.texts.len() + below
    }

    fn is_empty(&self) -> bool {
        self.places.is_empty() && self.elements.as_ref().is_none_or(|elements| elements.is_empty())
    }

    /// Differs after a [`join`](Self::join) that was news, but for news of the elements.
    fn outline(&self) -> (usize, usize, bool, bool, bool) {
        (self.places.len(), self.texts.len(), self.mixed, self.keyed, self.elements.is_some())
    }

    /// Takes what `other` may be too. Says whether that was news. What lies too deep to be followed is `lost`, and must
    /// be taken to be read whole.
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

/// The places that the plan's entrypoints can read.
pub fn reads(plan: &Plan) -> Result<Reads, TooComplex> {
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

/// A function, a local, and in which of the function's blocks it began: other definitions of a rule use the same
/// numbers for other things. Parameters begin before the first.
type Local = (String, u32, usize);

/// A list or set that statements of one block build.
#[derive(Clone)]
struct List {
    /// Depth of that block.
    depth: usize,
    /// The steps that each element may be as a key.
    steps: Vec<Vec<Step>>,
}

struct Pass<'a> {
    plan: &'a Plan,
    functions: HashMap<&'a str, &'a Function>,
    flows: HashMap<Local, Flow>,
    /// In which block of the function under way a local last began anew.
    begun: HashMap<u32, usize>,
    /// The lists and sets that were built so far in the blocks under way.
    lists: HashMap<u32, List>,
    /// Those of them that came, grew or went, block by block.
    changed: Vec<u32>,
    /// Blocks around the statement under way.
    depth: usize,
    returns: HashMap<String, Flow>,
    /// The rule that first returned what may come from a place.
    returned: BTreeMap<Place, Site>,
    reads: Reads,
    /// The statement that assigns a local once or inserts into an object once, until a second one is found.
    once: HashMap<Local, Option<*const Stmt>>,
    /// Loops around the statement under way.
    scans: usize,
    /// Places and statements looked at so far.
    work: usize,
    /// Steps of all places in `flows`, counted when they came.
    stored: usize,
    /// A value may come from too many places.
    is_over: bool,
    /// Something was learnt in this round.
    news: bool,
}

impl Pass<'_> {
    /// Whether a bound is reached. Nothing that was found counts then.
    fn is_over(&self) -> bool {
        self.is_over
            || self.work > WORK_MAX
            || self.stored > STORED_STEPS_MAX
            || self.reads.0.len() > PLACES_MAX
    }

    /// Runs the blocks of a function. A local whose first mention in a block is that it is assigned begins anew there.
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
            // Whether the block runs to its end is not known: what it built or changed is not known behind it.
            self.work += self.changed.len() - first;
            for local in &self.changed[first..] {
                self.lists.remove(local);
            }
            if self.depth == 0 {
                self.changed.clear();
            }
        }
    }

    /// Follows the building of lists and sets.
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
            // One that an inner block adds to may grow any number of times.
            if list.depth == depth && list.steps.len() < LIST_MAX {
                list.steps.push(self.flow(scope, plan.operand(stmt, "value")).steps());
                self.lists.insert(local, list);
            }
        }
    }

    /// The steps that each element of a list or set may be, if it is known which elements it has.
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
                // Where the value was found says more than the head of the rule.
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
                    // What is read in its stead is read at another place.
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
            // A call that only an input decides, and whatever OPA adds one day.
            _ => {
                self.whole(&data(), site.as_ref());
                self.blocks(scope, &stmt.blocks);
            }
        }
    }

    fn equal(&mut self, scope: &str, stmt: &Stmt, site: Option<&Site>) {
        let sides = ["a", "b"].map(|side| self.plan.operand(stmt, side));
        let is_scalar = |side: &Option<Operand>| matches!(side, Some(Operand::Text(_) | Operand::Bool(_)));
        // Against a scalar a container is unequal, whatever is in it.
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
                // A plan that is not as expected.
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
                // A key that is an array is a path.
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
            // The kind of a value is read with every step to it.
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

    /// Reads whole what cannot be followed.
    fn lose(&mut self, lost: BTreeSet<Place>) {
        for place in lost {
            self.news |= self.reads.add(&place, Extent::Whole, None);
        }
    }

    /// What lies one of these steps below, of which it is read at least that it is there.
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

    /// Whether the statement may run twice for one local: in a loop, or beside another one.
    fn may_repeat(&mut self, scope: &str, stmt: &Stmt, name: &str) -> bool {
        let Some(local) = stmt.local(name) else { return true };
        let this = std::ptr::from_ref(stmt);
        let first = self.once.entry(self.local(scope, local)).or_insert(Some(this));
        if *first != Some(this) {
            *first = None;
        }
        self.scans > 0 || first.is_none()
    }

    /// Reads what it takes to tell whether two values are equal.
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
            // What OPA itself takes in the end has no place in a module; the rule that returned it has.
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
                // No call of the function was seen so far.
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
            // A plan that is not as expected.
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

    /// Puts a value into a container.
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

/// The names that a list holds, if it holds nothing else.
fn names(list: Vec<Vec<Step>>) -> Option<Vec<Arc<str>>> {
    let name = |step| match step {
        Step::Name(name) => Some(name),
        Step::Any => None,
    };
    list.into_iter().flatten().map(name).collect()
}

/// The names in a path as `json.filter` takes it (OPA v1/topdown/json.go, `parsePath`): a JSON pointer that may lack
/// its first slash or have several. Names between two slashes are empty; no path at all names the whole value.
fn pointer(path: &str) -> Vec<Arc<str>> {
    let names = (!path.is_empty()).then(|| path.trim_start_matches('/').split('/'));
    names.into_iter().flatten().map(|name| name.replace("~1", "/").replace("~0", "~").into()).collect()
}

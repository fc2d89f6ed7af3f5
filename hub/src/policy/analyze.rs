//! What of the data policies can read, by a data-flow pass over OPA's [`Plan`].
//!
//! Each local stands for the places below `data` that its value may come from. A step into a place is a read of what
//! lies there; whoever takes a value whole (compares, returns, prints it, hands it to a builtin) reads all below it.
//! Nothing is guessed: what the pass does not know reads everything that it is given.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use opa_hub_proto::path::DirPath;

use super::plan::{Block, Function, Operand, Plan, Site, Stmt};

/// Steps of one place. Rego forbids recursion, so that paths end; this bounds what a plan that lies may cost.
const STEPS_MAX: usize = 32;
/// Places that are told apart: beyond, policies read everything. A hundred real ones read a few hundred.
const PLACES_MAX: usize = 20_000;
/// Containers in containers whose elements are followed.
const NESTING_MAX: usize = 8;

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
    /// Whether there is something, and the value itself where it is no container.
    Shallow,
    /// All that lies below it.
    Whole,
}

/// Readers of a place that are remembered: enough to know where to look.
const SITES_MAX: usize = 8;

/// What is read, and by whom.
#[derive(Default, Debug)]
pub struct Reads(BTreeMap<Place, (Extent, BTreeSet<Site>)>);

impl Reads {
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

/// What a value may be.
#[derive(Clone, Default, PartialEq, Eq)]
struct Flow {
    /// Places that it may come from.
    places: BTreeSet<Place>,
    /// What its elements may be, when it was built of others.
    elements: Option<Box<Flow>>,
    /// The texts that it is for certain one of; none: anything.
    texts: Option<BTreeSet<Arc<str>>>,
}

impl Flow {
    fn is_empty(&self) -> bool {
        self.places.is_empty() && self.elements.as_ref().is_none_or(|elements| elements.is_empty())
    }

    /// Takes what `other` may be too. Says whether that was news. What lies too deep to be followed is `lost`, and must
    /// be taken to be read whole.
    fn join(&mut self, other: &Self, depth: usize, lost: &mut BTreeSet<Place>) -> bool {
        let before = self.places.len();
        self.places.extend(other.places.iter().cloned());
        let mut news = self.places.len() > before;
        if let Some(elements) = &other.elements {
            if depth < NESTING_MAX {
                news |= self.elements.is_none();
                news |= self.elements.get_or_insert_default().join(elements, depth + 1, lost);
            } else {
                elements.all_places(lost);
            }
        }
        news
    }

    fn all_places(&self, into: &mut BTreeSet<Place>) {
        into.extend(self.places.iter().cloned());
        if let Some(elements) = &self.elements {
            elements.all_places(into);
        }
    }
}

/// The places that the plan's entrypoints can read.
pub fn reads(plan: &Plan) -> Reads {
    let mut pass = Pass {
        plan,
        functions: plan.functions(),
        flows: HashMap::new(),
        begun: HashMap::new(),
        lists: HashMap::new(),
        returns: HashMap::new(),
        returned: BTreeMap::new(),
        reads: Reads::default(),
        news: false,
    };
    loop {
        pass.news = false;
        for (at, blocks) in plan.entries().enumerate() {
            let scope = format!("entrypoint {at}");
            pass.set((scope.clone(), 1, 0), &data());
            pass.body(&scope, blocks);
        }
        let mut functions: Vec<&Function> = pass.functions.values().copied().collect();
        functions.sort_unstable_by_key(|function| &function.name);
        for function in functions {
            pass.body(&function.name, &function.blocks);
        }
        if pass.reads.0.len() > PLACES_MAX {
            pass.whole(&data(), None);
            return pass.reads;
        }
        if !pass.news {
            return pass.reads;
        }
    }
}

fn data() -> Flow {
    Flow { places: BTreeSet::from([Vec::new()]), ..Flow::default() }
}

/// A function, a local, and in which of the function's blocks it began: other definitions of a rule use the same
/// numbers for other things. Parameters begin before the first.
type Local = (String, u32, usize);

struct Pass<'a> {
    plan: &'a Plan,
    functions: HashMap<&'a str, &'a Function>,
    flows: HashMap<Local, Flow>,
    /// In which block of the function under way a local last began anew.
    begun: HashMap<u32, usize>,
    /// The lists and sets of nothing but texts that were built so far in the block under way.
    lists: HashMap<u32, Vec<Arc<str>>>,
    returns: HashMap<String, Flow>,
    /// The rule that first returned what may come from a place.
    returned: BTreeMap<Place, Site>,
    reads: Reads,
    /// Something was learnt in this round.
    news: bool,
}

impl Pass<'_> {
    /// Runs the blocks of a function. A local whose first mention in a block is that it is assigned begins anew there.
    fn body(&mut self, scope: &str, blocks: &[Block]) {
        self.begun.clear();
        for (at, block) in blocks.iter().enumerate() {
            let (mut mentioned, mut begun) = (BTreeSet::new(), BTreeSet::new());
            self.mentions(block, &mut mentioned, &mut begun);
            self.begun.extend(begun.into_iter().map(|local| (local, at + 1)));
            self.blocks(scope, std::iter::once(block));
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
            for block in stmt.blocks() {
                self.mentions(&block, mentioned, begun);
            }
        }
    }

    fn local(&self, scope: &str, local: u32) -> Local {
        (scope.to_owned(), local, self.begun.get(&local).copied().unwrap_or_default())
    }

    fn blocks<'b>(&mut self, scope: &str, blocks: impl Iterator<Item = &'b Block>) {
        for block in blocks {
            let before = self.lists.clone();
            for stmt in &block.stmts {
                self.build(stmt);
                self.stmt(scope, stmt);
            }
            // Whether the block runs to its end is not known: what it built or changed is not known behind it.
            self.lists.retain(|local, list| before.get(local) == Some(list));
        }
    }

    /// Follows the building of lists and sets of texts.
    fn build(&mut self, stmt: &Stmt) {
        for target in stmt.targets() {
            self.lists.remove(&target);
        }
        let (made, grown) = match stmt.kind.as_str() {
            "MakeArrayStmt" | "MakeSetStmt" => (stmt.local("target"), None),
            "ArrayAppendStmt" => (None, stmt.local("array")),
            "SetAddStmt" => (None, stmt.local("set")),
            _ => (None, None),
        };
        self.lists.extend(made.map(|local| (local, Vec::new())));
        if let Some((local, mut list)) = grown.and_then(|local| self.lists.remove_entry(&local))
            && let Some(Operand::Text(text)) = self.plan.operand(stmt, "value")
        {
            list.push(text.into());
            self.lists.insert(local, list);
        }
    }

    /// The texts of a list or set, if it is for certain one of these.
    fn texts(&self, operand: Option<&Operand>) -> Option<Vec<Arc<str>>> {
        match operand {
            Some(Operand::Local(local)) => self.lists.get(local).cloned(),
            _ => None,
        }
    }

    fn stmt(&mut self, scope: &str, stmt: &Stmt) {
        let plan = self.plan;
        let site = plan.site(stmt);
        let operand = |name: &str| plan.operand(stmt, name);
        let flow = |pass: &Self, name: &str| pass.flow(scope, plan.operand(stmt, name));
        match stmt.kind.as_str() {
            "NopStmt" | "BreakStmt" | "ResetLocalStmt" | "IsArrayStmt" | "IsObjectStmt" | "IsSetStmt"
            | "IsDefinedStmt" | "IsUndefinedStmt" => {}
            "MakeNullStmt" | "MakeNumberIntStmt" | "MakeNumberRefStmt" | "AssignIntStmt"
            | "MakeArrayStmt" | "MakeObjectStmt" | "MakeSetStmt" => {
                self.assign(scope, stmt, "target", &Flow::default());
            }
            "AssignVarStmt" | "AssignVarOnceStmt" => {
                let mut source = flow(self, "source");
                if let Some(Operand::Text(text)) = operand("source") {
                    source.texts = Some(BTreeSet::from([text.into()]));
                }
                self.assign(scope, stmt, "target", &source);
            }
            "DotStmt" => {
                let (source, key) = (flow(self, "source"), flow(self, "key"));
                self.whole(&key, site.as_ref());
                let target = self.dot(&source, &self.steps(scope, operand("key")), site.as_ref());
                self.assign(scope, stmt, "target", &target);
            }
            "ScanStmt" => {
                let value = self.dot(&flow(self, "source"), &[Step::Any], site.as_ref());
                self.assign(scope, stmt, "key", &Flow::default());
                self.assign(scope, stmt, "value", &value);
                self.blocks(scope, stmt.blocks().iter());
            }
            "LenStmt" => {
                self.dot(&flow(self, "source"), &[Step::Any], site.as_ref());
                self.assign(scope, stmt, "target", &Flow::default());
            }
            "EqualStmt" | "NotEqualStmt" => {
                let (a, b) = (operand("a"), operand("b"));
                let is_scalar = |side| matches!(side, Some(Operand::Text(_) | Operand::Bool(_)));
                // Against a scalar a container is unequal, whatever it holds.
                if !is_scalar(a) && !is_scalar(b) {
                    self.whole(&flow(self, "a"), site.as_ref());
                    self.whole(&flow(self, "b"), site.as_ref());
                }
            }
            "ArrayAppendStmt" => self.put(scope, stmt, "array"),
            "SetAddStmt" => self.put(scope, stmt, "set"),
            "ObjectInsertStmt" | "ObjectInsertOnceStmt" => {
                self.whole(&flow(self, "key"), site.as_ref());
                self.put(scope, stmt, "object");
            }
            "ObjectMergeStmt" => {
                let mut merged = flow(self, "a");
                let mut lost = BTreeSet::new();
                merged.join(&flow(self, "b"), 0, &mut lost);
                self.lose(lost);
                merged.texts = None;
                self.assign(scope, stmt, "target", &merged);
            }
            "BlockStmt" | "NotStmt" => self.blocks(scope, stmt.blocks().iter()),
            "WithStmt" => {
                let value = flow(self, "value");
                if stmt.has_path() {
                    // What is read in its stead is read at another place.
                    self.whole(&value, site.as_ref());
                } else {
                    self.assign(scope, stmt, "local", &value);
                }
                self.blocks(scope, stmt.blocks().iter());
            }
            "CallStmt" => self.call(scope, stmt, site.as_ref()),
            "ReturnLocalStmt" => {
                let source = flow(self, "source");
                let returned = self.returns.entry(scope.to_owned()).or_default();
                let mut lost = BTreeSet::new();
                self.news |= returned.join(&source, 0, &mut lost);
                self.lose(lost);
                if let Some(site) = site {
                    for place in source.places {
                        self.returned.entry(place).or_insert_with(|| site.clone());
                    }
                }
            }
            "ResultSetAddStmt" => self.whole(&flow(self, "value"), site.as_ref()),
            // A call that only an input decides, and whatever OPA adds one day.
            _ => {
                self.whole(&data(), site.as_ref());
                self.blocks(scope, stmt.blocks().iter());
            }
        }
    }

    fn call(&mut self, scope: &str, stmt: &Stmt, site: Option<&Site>) {
        let name = stmt.text("func").unwrap_or_default();
        let operands = self.plan.operands(stmt, "args");
        let args: Vec<Flow> = operands.iter().map(|operand| self.flow(scope, Some(*operand))).collect();
        if let Some(function) = self.functions.get(name).copied() {
            for (param, arg) in function.params.iter().zip(&args) {
                self.set((name.to_owned(), *param, 0), arg);
            }
            let result = self.returns.get(name).cloned().unwrap_or_default();
            self.assign(scope, stmt, "result", &result);
            return;
        }
        let result = match (name, &args[..]) {
            ("object.get", [object, key, default]) => {
                self.whole(key, site);
                let steps = match operands.get(1) {
                    Some(Operand::Text(text)) => Some(vec![(*text).into()]),
                    list => self.texts(list),
                };
                if let Some(steps) = steps {
                    let mut result = object.clone();
                    for step in steps {
                        result = self.dot(&result, &[Step::Name(step)], site);
                    }
                    let mut lost = BTreeSet::new();
                    result.join(default, 0, &mut lost);
                    self.lose(lost);
                    result.texts = None;
                    result
                } else {
                    self.whole(object, site);
                    self.whole(default, site);
                    Flow::default()
                }
            }
            ("json.filter" | "object.filter", [object, kept]) => {
                self.whole(kept, site);
                match self.texts(operands.get(1)) {
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
                Flow::default()
            }
            ("count" | "object.keys", [source]) => {
                self.dot(source, &[Step::Any], site);
                Flow::default()
            }
            _ => {
                for arg in &args {
                    self.whole(arg, site);
                }
                Flow::default()
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

    /// The steps that a key may be.
    fn steps(&self, scope: &str, key: Option<Operand>) -> Vec<Step> {
        match key {
            Some(Operand::Text(text)) => vec![Step::Name(text.into())],
            Some(Operand::Local(local)) => match self.flows.get(&self.local(scope, local)) {
                Some(Flow { texts: Some(texts), .. }) => texts.iter().cloned().map(Step::Name).collect(),
                _ => vec![Step::Any],
            },
            _ => vec![Step::Any],
        }
    }

    /// What lies one of these steps below, of which it is read at least that it is there.
    fn dot(&mut self, source: &Flow, steps: &[Step], site: Option<&Site>) -> Flow {
        let mut target = Flow::default();
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

    fn whole(&mut self, flow: &Flow, site: Option<&Site>) {
        for place in &flow.places {
            // What OPA itself takes in the end has no place in a module; the rule that returned it has.
            let site = site.or_else(|| self.returned.get(place));
            self.news |= self.reads.add(place, Extent::Whole, site);
        }
        if let Some(elements) = &flow.elements {
            self.whole(elements, site);
        }
    }

    fn flow(&self, scope: &str, operand: Option<Operand>) -> Flow {
        match operand {
            Some(Operand::Local(local)) => {
                self.flows.get(&self.local(scope, local)).cloned().unwrap_or_default()
            }
            _ => Flow::default(),
        }
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
        match self.flows.entry(local) {
            Entry::Vacant(place) => {
                place.insert(flow.clone());
                self.news = true;
            }
            Entry::Occupied(mut held) => {
                let held = held.get_mut();
                self.news |= held.join(flow, 0, &mut lost);
                // It is one of these texts for certain only if it is so wherever it comes from.
                let before = held.texts.take();
                if let (Some(one), Some(other)) = (&before, &flow.texts) {
                    held.texts = Some(one | other);
                }
                self.news |= held.texts != before;
            }
        }
        self.lose(lost);
    }

    /// Puts a value into a container.
    fn put(&mut self, scope: &str, stmt: &Stmt, container: &str) {
        let (mut elements, mut lost) = (Flow::default(), BTreeSet::new());
        elements.join(&self.flow(scope, self.plan.operand(stmt, "value")), 1, &mut lost);
        match stmt.local(container) {
            Some(_) if elements.is_empty() => {}
            Some(local) => {
                let built = Flow { elements: Some(Box::new(elements)), ..Flow::default() };
                let held = self.flows.entry(self.local(scope, local)).or_default();
                self.news |= held.join(&built, 0, &mut lost);
            }
            None => self.whole(&elements, None),
        }
        self.lose(lost);
    }
}

/// The names in a path as `json.filter` takes it (OPA v1/topdown/json.go, `parsePath`): a JSON pointer that may lack
/// its first slash.
fn pointer(path: &str) -> Vec<Arc<str>> {
    let names = path.trim_start_matches('/').split('/').filter(|name| !name.is_empty());
    names.map(|name| name.replace("~1", "/").replace("~0", "~").into()).collect()
}

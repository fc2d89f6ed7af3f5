//! End to end on real components: what reaches OPA, by each of the three ways, whatever is killed meanwhile.

mod auto;

mod bundles;

mod crashes;

mod failover;

mod fanout;

mod faults;

mod features;

mod fields;

mod folder;

mod images;

mod kube_mgmt;

mod last_good;

mod layout;

mod namespaces;

mod opa_kills;

mod policies;

mod proxy;

mod replicas;

mod scenarios;

mod slow_policies;

mod sources;

mod verdicts;

mod ways;

mod world;

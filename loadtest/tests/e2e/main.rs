//! End-to-end tests on real components.

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

//! The lab: real etcd, kube-apiserver, kubectl and OPA as child processes, with hub and agents beside them, for the
//! demo, the end-to-end tests and the load runs alike.

pub mod lab;

pub mod cluster;

pub mod eventually;

pub mod pods;

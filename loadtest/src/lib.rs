//! The lab: real etcd, kube-apiserver, kubectl and OPA for tests, demo and load runs.

pub mod lab;

pub mod cluster;

pub mod eventually;

pub mod pods;

//! Hosts whose key writes only: they back up and archive like others, read nothing of what they wrote, and the operator's
//! key restores it. And the end of a stanza, when its keys are destroyed.

mod collector;
mod erasure;
mod fixture;
mod hosts;
mod lies;
#[path = "../stores/mod.rs"]
mod stores;

//! The pod's machine, from outside: what it may use of the host ([`allotment`]), its launch ([`launch`]), its processes and its
//! state ([`supervisor`]), streams into the guest ([`dial`]), and where the time went ([`timeline`]).

pub mod allotment;
pub mod dial;
pub mod images;
pub mod launch;
pub mod supervisor;
pub mod timeline;

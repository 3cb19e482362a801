//! `linux.resources`: blockIO, hugepageLimits, rdma, unified.

use caisson_protos::weights;
use oci_spec::runtime::{LinuxBlockIo, LinuxResources};

use super::{
    super::{Result, SpecError, text},
    Limit, Need,
};

/// Files whose names begin like this belong to the cgroup itself. They move, stop and kill processes, or make the
/// cgroup one that can hold none; only these are limits.
const CGROUP_LIMITS: [&str; 2] = ["cgroup.max.depth", "cgroup.max.descendants"];

pub(super) fn limits(resources: &LinuxResources, limits: &mut Vec<Limit>) -> Result<()> {
    if let Some(io) = resources.block_io() {
        block(io, limits)?;
    }
    for (index, page) in resources.hugepage_limits().iter().flatten().enumerate() {
        let field = format!("linux.resources.hugepageLimits[{index}]");
        let size = page.page_size();
        if size.is_empty() || !size.chars().all(|letter| letter.is_ascii_alphanumeric()) {
            return Err(SpecError::new(format!("{field}.pageSize"), format!("{size:?} is no size such as 2MB or 1GB")));
        }
        let value = super::or_max(page.limit());
        let field = format!("{field}.limit");
        limits.push(Limit::new(format!("hugetlb.{size}.max"), &value, &field));
        // What is mapped but not yet touched. Kernels before 5.7 do not count it.
        limits.push(Limit { need: Need::IfThere, ..Limit::new(format!("hugetlb.{size}.rsvd.max"), value, field) });
    }
    let mut rdma: Vec<_> = resources.rdma().iter().flatten().collect();
    rdma.sort_by_key(|(device, _)| *device);
    for (device, limit) in rdma {
        let field = format!("linux.resources.rdma[{device:?}]");
        if device.is_empty() || device.contains(char::is_whitespace) {
            return Err(SpecError::new(field, "is no device's name"));
        }
        let numbers = [("hca_handle", limit.hca_handles()), ("hca_object", limit.hca_objects())];
        let set: String =
            numbers.iter().filter_map(|(key, value)| value.map(|value| format!(" {key}={value}"))).collect();
        if set.is_empty() {
            return Err(SpecError::new(field, "names neither hcaHandles nor hcaObjects"));
        }
        limits.push(Limit::new("rdma.max", format!("{}{set}", text(&field, device)?), field));
    }
    Ok(())
}

fn block(io: &LinuxBlockIo, limits: &mut Vec<Limit>) -> Result<()> {
    let of = |name: &str| format!("linux.resources.blockIO.{name}");
    let no_leaf = |field: String, value: Option<u16>| match value.filter(|value| *value != 0) {
        Some(value) => Err(SpecError::new(field, format!("{value}: cgroup v2 has no such weight; remove it"))),
        None => Ok(()),
    };
    no_leaf(of("leafWeight"), io.leaf_weight())?;
    if let Some(weight) = io.weight().filter(|weight| *weight != 0) {
        weigh(None, weight, of("weight"), limits)?;
    }
    for (index, device) in io.weight_device().iter().flatten().enumerate() {
        let field = of(&format!("weightDevice[{index}]"));
        no_leaf(format!("{field}.leafWeight"), device.leaf_weight())?;
        if let Some(weight) = device.weight().filter(|weight| *weight != 0) {
            let number = number(&field, device.major(), device.minor())?;
            weigh(Some(number), weight, format!("{field}.weight"), limits)?;
        }
    }
    for (name, key, list) in [
        ("throttleReadBpsDevice", "rbps", io.throttle_read_bps_device()),
        ("throttleWriteBpsDevice", "wbps", io.throttle_write_bps_device()),
        ("throttleReadIOPSDevice", "riops", io.throttle_read_iops_device()),
        ("throttleWriteIOPSDevice", "wiops", io.throttle_write_iops_device()),
    ] {
        for (index, device) in list.iter().flatten().enumerate() {
            let field = of(&format!("{name}[{index}]"));
            let number = number(&field, device.major(), device.minor())?;
            // 0 takes a limit away, as in cgroup v1.
            let rate = if device.rate() == 0 { "max".into() } else { device.rate().to_string() };
            limits.push(Limit::new("io.max", format!("{number} {key}={rate}"), field));
        }
    }
    Ok(())
}

/// BFQ, where the kernel has it, takes v1's weights, 10 to 1000; the other scheduler has 1 to 10000.
fn weigh(device: Option<String>, weight: u16, field: String, limits: &mut Vec<Limit>) -> Result<()> {
    if !(10..=1000).contains(&weight) {
        return Err(SpecError::new(field, format!("{weight} is not between 10 and 1000")));
    }
    let value = |weight: u64| match &device {
        Some(device) => format!("{device} {weight}"),
        None => weight.to_string(),
    };
    let bfq = ("io.bfq.weight".into(), value(weight.into()));
    let own = ("io.weight".into(), value(weights::io(weight)));
    limits.push(Limit { choices: vec![bfq, own], field, need: Need::Must });
    Ok(())
}

fn number(field: &str, major: i64, minor: i64) -> Result<String> {
    match (u32::try_from(major), u32::try_from(minor)) {
        (Ok(major), Ok(minor)) => Ok(format!("{major}:{minor}")),
        _ => Err(SpecError::new(field, format!("{major}:{minor} is no device number"))),
    }
}

pub(super) fn unified(resources: &LinuxResources, limits: &mut Vec<Limit>) -> Result<()> {
    let mut files: Vec<_> = resources.unified().iter().flatten().collect();
    files.sort();
    for (file, value) in files {
        let field = format!("linux.resources.unified[{file:?}]");
        let controller = file.split_once('.').map(|(controller, _)| controller).unwrap_or_default();
        if controller.is_empty() || file.contains('/') || file.contains('\0') {
            return Err(SpecError::new(field, "is not the name of a cgroup file, as memory.high"));
        }
        if controller == "cgroup" && !CGROUP_LIMITS.contains(&file.as_str()) {
            return Err(SpecError::new(field, "is no limit: it is for the runtime to write"));
        }
        limits.push(Limit::new(file, value, field));
    }
    Ok(())
}

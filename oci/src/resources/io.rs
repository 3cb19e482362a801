//! Block devices: `blockIO`, and files `io.*` of `unified`.

use oci_spec::runtime::LinuxBlockIo;

use crate::{FieldError, weights};

/// One line for the io controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IoLimit {
    /// Files and what to write to them; of several the first one that exists.
    pub choices: Vec<(String, String)>,
    /// The specification's field.
    pub field: String,
}

type Result<T> = std::result::Result<T, FieldError>;

pub(super) fn read(io: &LinuxBlockIo, limits: &mut Vec<IoLimit>) -> Result<()> {
    let of = |name: &str| format!("linux.resources.blockIO.{name}");
    no_leaf(of("leafWeight"), io.leaf_weight())?;
    if let Some(weight) = io.weight().filter(|weight| *weight != 0) {
        limits.push(weighted(None, weight, of("weight"))?);
    }
    for (index, device) in io.weight_device().iter().flatten().enumerate() {
        let field = of(&format!("weightDevice[{index}]"));
        no_leaf(format!("{field}.leafWeight"), device.leaf_weight())?;
        if let Some(weight) = device.weight().filter(|weight| *weight != 0) {
            let number = number(&field, device.major(), device.minor())?;
            limits.push(weighted(Some(number), weight, format!("{field}.weight"))?);
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
            limits.push(IoLimit { choices: vec![("io.max".into(), format!("{number} {key}={rate}"))], field });
        }
    }
    Ok(())
}

fn no_leaf(field: String, value: Option<u16>) -> Result<()> {
    match value.filter(|value| *value != 0) {
        Some(value) => Err(FieldError::new(field, format!("{value}: cgroup v2 has no such weight; remove it"))),
        None => Ok(()),
    }
}

/// BFQ, where the kernel has it, takes v1's weights; the other scheduler has 1 to 10000.
fn weighted(device: Option<String>, weight: u16, field: String) -> Result<IoLimit> {
    let Some(converted) = weights::io(weight) else {
        return Err(FieldError::new(field, format!("{weight} is not between 10 and 1000")));
    };
    let line = |weight: u64| match &device {
        Some(device) => format!("{device} {weight}"),
        None => weight.to_string(),
    };
    let choices = vec![("io.bfq.weight".into(), line(weight.into())), ("io.weight".into(), line(converted))];
    Ok(IoLimit { choices, field })
}

fn number(field: &str, major: i64, minor: i64) -> Result<String> {
    match (u32::try_from(major), u32::try_from(minor)) {
        (Ok(major), Ok(minor)) => Ok(format!("{major}:{minor}")),
        _ => Err(FieldError::new(field, format!("{major}:{minor} is no device number"))),
    }
}

/// Whether a file of `unified` is about block devices.
pub fn is_io_file(file: &str) -> bool {
    file.strip_prefix("io.").is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'.'))
}

/// The lines of a file of `unified`: the kernel takes one with each write.
pub(super) fn lines(file: &str, value: &str, field: &str, limits: &mut Vec<IoLimit>) {
    limits.extend(
        value
            .lines()
            .map(|line| IoLimit { choices: vec![(file.to_owned(), line.to_owned())], field: field.to_owned() }),
    );
}

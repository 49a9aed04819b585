//! From SPECs to devices: makes the model of each, and says what its IOMMU can do.
//!
//! This is the one place that knows which word makes which device. Everything that can fail about a device fails
//! here, before a server exists.

use std::sync::Arc;

use anyhow::{Context, Result};
use compat::device::DeviceModel;
use cuse_frontend::DeviceSpec;
use device_shim::ioat::Ioat;
use device_shim::nvme::{Nvme, Options};
use device_shim::probe::Probe;
use hwpt::{DeviceProperties, Format};

use crate::spec::{Kind, Spec};

/// A device for each SPEC, in their order.
///
/// # Errors
/// The first device that cannot be made; the message is one line.
pub(crate) fn make(specs: Vec<Spec>) -> Result<Vec<DeviceSpec>> {
    specs.into_iter().map(device).collect()
}

fn device(spec: Spec) -> Result<DeviceSpec> {
    let context = || format!("--device {}", spec.bdf);
    Ok(DeviceSpec {
        bdf: spec.bdf,
        group: spec.group,
        noiommu: spec.noiommu,
        properties: properties(&spec).with_context(context)?,
        model: model(&spec).with_context(context)?,
    })
}

fn model(spec: &Spec) -> Result<Arc<dyn DeviceModel>> {
    match &spec.kind {
        Kind::Nvme { file } => {
            // A serial number of its own for each, so that a guest can tell two disks apart.
            let serial = spec.bdf.to_string();
            Ok(Nvme::new(Options { serial, ..Options::new(file) })?)
        }
        Kind::DmaProbe => Ok(Probe::new()?),
        Kind::Ioat => Ok(Ioat::new()?),
    }
}

fn properties(spec: &Spec) -> Result<DeviceProperties> {
    Ok(DeviceProperties {
        unit: spec.unit.clone(),
        format: match &spec.windows {
            Some(windows) => windows.default_format()?,
            None => Format::new(spec.page_sizes, vec![spec.aperture])?,
        },
        reserved: spec.reserved.clone(),
        coherent: spec.coherent,
        dirty_tracking: true,
        windows: spec.windows.clone(),
    })
}

//! From SPECs to devices: makes the model of each, and says what its IOMMU can do.
//!
//! This is the one place that knows which word makes which device. Everything that can fail about a device fails
//! here, before a server exists.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result};
use compat::device::DeviceModel;
use cuse_frontend::DeviceSpec;
use device_shim::ioat::Ioat;
use device_shim::nvme::{Nvme, Options};
use device_shim::probe::Probe;
use hwpt::vtd::{Capability, VtdUnit};
use hwpt::{DeviceProperties, Format, IommuDriver};

use crate::spec::{Kind, Spec};

/// A device, and the IOMMU unit it is behind, where that is none of the server's own.
pub(crate) type Made = (Option<Arc<dyn IommuDriver>>, DeviceSpec);

/// A device for each SPEC, in their order, and the IOMMU unit it is behind, where that is none of the server's own.
/// Devices behind a unit of VT-d with the same name share it; with `strict` such a unit has nothing that Linux's has not.
///
/// # Errors
/// The first device that cannot be made; the message is one line.
pub(crate) fn make(specs: Vec<Spec>, strict: bool) -> Result<Vec<Made>> {
    let mut units: BTreeMap<String, Arc<dyn IommuDriver>> = BTreeMap::new();
    let mut unit_of = |spec: &Spec| {
        let made = || Arc::new(VtdUnit::new(Capability::FULL).strict(strict)) as Arc<dyn IommuDriver>;
        spec.vtd.then(|| Arc::clone(units.entry(spec.unit.clone()).or_insert_with(made)))
    };
    specs.into_iter().map(|spec| Ok((unit_of(&spec), device(spec)?))).collect()
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
    let unit = match &spec.windows {
        Some(windows) => DeviceProperties::with_windows(&spec.unit, windows.clone())?,
        None => DeviceProperties::new(&spec.unit, Format::new(spec.page_sizes, vec![spec.aperture])?),
    };
    Ok(DeviceProperties { reserved: spec.reserved.clone(), coherent: spec.coherent, ..unit })
}

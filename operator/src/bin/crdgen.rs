//! `crdgen [REPOSITORY]`: writes the definition of `ConversationModel` to `crds/` and into its chart.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use anyhow::Context;

fn main() -> anyhow::Result<()> {
    let repository = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("."), PathBuf::from);
    let yaml = operator::api::crd_yaml();
    for file in operator::api::CRD_FILES {
        let path = repository.join(file);
        write(&path, &yaml)?;
        println!("{}", path.display());
    }
    Ok(())
}

fn write(path: &Path, yaml: &str) -> anyhow::Result<()> {
    let folder = path.parent().context("a file lies in a folder")?;
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    std::fs::write(path, yaml).with_context(|| format!("cannot write {}", path.display()))
}

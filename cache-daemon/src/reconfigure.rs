//! Settings that change while the daemon runs (`PATCH /config` of the admin API, `kvctl config`).
//!
//! A change is checked as a whole before any of it is made. It lasts until the worker starts anew: what is to
//! stay belongs into the flags as well. Another policy, or other quotas, begin an order anew that learns of the
//! blocks part by part; a smaller disk tier is left part by part: no turn of the loop takes long for it.

use serde::{Deserialize, Serialize};

use crate::policy::PolicyKind;
use crate::store::{Store, TenantShare};

/// What is to change; what is absent stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct Change {
    /// Which blocks leave the tiers first.
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<PolicyKind>,
    /// Percent of the region's frames that may hold blocks. Whatever leaves for it is kept on disk, if there is
    /// one; the memory stays the daemon's.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_percent: Option<u8>,
    /// Bytes that the disk tier may take. Of a smaller one blocks leave, and its files stay; a larger one needs
    /// that much room on its volume.
    #[arg(long, value_parser = crate::config::parse_bytes)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
    /// Seconds after its last use at which a block is forgotten; 0 is never.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl_seconds: Option<u64>,
    /// Seconds after its last use at which a tail goes to disk.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tail_idle_seconds: Option<u64>,
    /// Percent of the host tier that a tenant may have before its own blocks leave first.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant_host_share: Option<u8>,
    /// Percent of the disk tier that a tenant may have before its own blocks leave first.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant_disk_share: Option<u8>,
    /// Bytes that may be written to disk in a day; 0 is no bound.
    #[arg(long, value_parser = crate::config::parse_bytes)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_write_bytes_per_day: Option<u64>,
    /// Bytes a second that go to other daemons and the remote tier, and as many that come; 0 is no bound.
    #[arg(long, value_parser = crate::config::parse_bytes)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migration_bytes_per_second: Option<u64>,
}

/// The settings in force, under the names of their flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct InForce {
    /// See [`Change::policy`].
    pub policy: PolicyKind,
    /// See [`Change::host_percent`].
    pub host_percent: u8,
    /// See [`Change::disk_bytes`].
    pub disk_bytes: u64,
    /// See [`Change::ttl_seconds`].
    pub ttl_seconds: u64,
    /// See [`Change::tail_idle_seconds`].
    pub tail_idle_seconds: u64,
    /// See [`Change::tenant_host_share`].
    pub tenant_host_share: u8,
    /// See [`Change::tenant_disk_share`].
    pub tenant_disk_share: u8,
    /// See [`Change::disk_write_bytes_per_day`].
    pub disk_write_bytes_per_day: u64,
    /// See [`Change::migration_bytes_per_second`].
    pub migration_bytes_per_second: u64,
}

/// Why nothing was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChangeError {
    /// A size below its bound.
    #[error("disk_bytes is {given}, must be at least {min}")]
    DiskBytes {
        /// Asked for.
        given: u64,
        /// Fewest.
        min: u64,
    },
    /// Bytes of what is not there.
    #[error("disk_bytes has nothing to bound: the daemon was started without --disk-dir")]
    NoDisk,
    /// A rate at which nothing would ever arrive.
    #[error("migration_bytes_per_second is {given}, must be 0 (no bound) or at least {min}")]
    Rate {
        /// Asked for.
        given: u64,
        /// Fewest.
        min: u64,
    },
    /// No share.
    #[error("{setting} is {given} percent, must be 1 to 100")]
    Share {
        /// Which.
        setting: &'static str,
        /// Asked for.
        given: u8,
    },
}

impl Change {
    fn check(&self, has_disk: bool) -> Result<(), ChangeError> {
        let min = crate::config::DISK_BYTES_MIN;
        match self.disk_bytes {
            Some(_) if !has_disk => return Err(ChangeError::NoDisk),
            Some(given) if given < min => return Err(ChangeError::DiskBytes { given, min }),
            _ => {}
        }
        let min = crate::config::MIGRATION_RATE_MIN;
        let rate = self.migration_bytes_per_second;
        if let Some(given) = rate.filter(|given| (1..min).contains(given)) {
            return Err(ChangeError::Rate { given, min });
        }
        let shares = [
            ("host_percent", self.host_percent),
            ("tenant_host_share", self.tenant_host_share),
            ("tenant_disk_share", self.tenant_disk_share),
        ];
        for (setting, share) in shares {
            if let Some(given) = share.filter(|share| !(1..=100).contains(share)) {
                return Err(ChangeError::Share { setting, given });
            }
        }
        Ok(())
    }
}

impl Store {
    /// The settings in force.
    pub fn in_force(&self) -> InForce {
        let TenantShare { host, disk } = self.config.tenant_share;
        InForce {
            policy: self.config.policy,
            host_percent: self.host_percent,
            disk_bytes: self.transfers.disk_bytes(),
            ttl_seconds: self.config.ttl_ms.unwrap_or(0) / 1000,
            tail_idle_seconds: self.config.tail_idle_ms / 1000,
            tenant_host_share: host,
            tenant_disk_share: disk,
            disk_write_bytes_per_day: self.budget.bytes_per_day().unwrap_or(0),
            migration_bytes_per_second: self.paces.sending.bytes_per_second(),
        }
    }

    /// Changes all that is asked for, or nothing.
    pub fn reconfigure(&mut self, change: &Change) -> Result<InForce, ChangeError> {
        change.check(self.config.disk_bytes > 0)?;
        let before = self.in_force();
        let config = &mut self.config;
        config.policy = change.policy.unwrap_or(config.policy);
        if let Some(seconds) = change.ttl_seconds {
            config.ttl_ms = (seconds > 0).then(|| seconds.saturating_mul(1000));
        }
        if let Some(seconds) = change.tail_idle_seconds {
            config.tail_idle_ms = seconds.saturating_mul(1000);
        }
        let share = &mut config.tenant_share;
        share.host = change.tenant_host_share.unwrap_or(share.host);
        share.disk = change.tenant_disk_share.unwrap_or(share.disk);
        self.host_percent = change.host_percent.unwrap_or(self.host_percent);
        if let Some(bytes) = change.migration_bytes_per_second {
            self.paces.set(bytes);
        }
        if let Some(bytes) = change.disk_bytes {
            self.transfers.set_disk_bytes(bytes);
            self.conversations.set_bytes_max(crate::store::record_bytes_max(bytes));
        }
        if let Some(bytes) = change.disk_write_bytes_per_day {
            self.budget.set((bytes > 0).then_some(bytes));
        }
        let after = self.in_force();
        let ranks = |in_force: &InForce| {
            let InForce { policy, host_percent, disk_bytes, .. } = *in_force;
            let InForce { tenant_host_share, tenant_disk_share, .. } = *in_force;
            (policy, host_percent, disk_bytes, tenant_host_share, tenant_disk_share)
        };
        if ranks(&before) != ranks(&after) {
            self.rebuild_index();
        }
        tracing::info!(?before, ?after, "settings changed");
        Ok(after)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_that_cannot_be_is_refused_with_its_bounds() {
        let check = |change: Change| change.check(true);
        assert_eq!(check(Change::default()), Ok(()));
        let disk = Change { disk_bytes: Some(1 << 20), ..Change::default() };
        assert!(check(disk).unwrap_err().to_string().contains("at least 16777216"));
        assert_eq!(disk.check(false), Err(ChangeError::NoDisk));
        let rate = Change { migration_bytes_per_second: Some(1), ..Change::default() };
        assert!(check(rate).is_err());
        let share = Change { tenant_host_share: Some(0), ..Change::default() };
        assert!(check(share).is_err());
    }

    #[test]
    fn an_unknown_setting_is_an_error_and_not_ignored() {
        assert!(serde_json::from_str::<Change>(r#"{"polcy": "lru"}"#).is_err());
        let change: Change = serde_json::from_str(r#"{"policy": "s3-fifo"}"#).unwrap();
        assert_eq!(change.policy, Some(PolicyKind::S3Fifo));
    }
}

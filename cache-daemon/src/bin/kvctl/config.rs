//! `kvctl config`: settings that change while the daemon runs.

use cache_daemon::reconfigure::Change;
use hyper::Method;

use crate::client::Client;
use crate::table::print_json;

/// Without an option: the settings in force. A change lasts until the daemon's worker starts anew; what is to stay
/// belongs into its flags as well.
#[derive(Debug, clap::Args)]
pub struct Config {
    #[command(flatten)]
    change: Change,
}

impl Config {
    pub fn run(&self, client: &Client, as_json: bool) -> anyhow::Result<()> {
        let in_force = if self.change == Change::default() {
            client.get("/config")?
        } else {
            client.send(Method::PATCH, "/config", Some(&serde_json::to_value(self.change)?))?
        };
        if as_json {
            return print_json(&in_force);
        }
        for (setting, value) in in_force.as_object().into_iter().flatten() {
            println!("{:<26}{}", setting.replace('_', "-"), value.to_string().trim_matches('"'));
        }
        Ok(())
    }
}

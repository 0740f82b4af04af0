//! What becomes of cached chunks.

use engine::{BlendConfig, GateConfig};

use super::Settings;

/// A setting, and what is wrong with it.
type Wrong = (&'static str, String);

impl Settings {
    /// What becomes of cached chunks.
    #[must_use]
    pub fn blending(&self) -> BlendConfig {
        BlendConfig {
            mode: self.blend.0,
            ratio: self.ratio,
            mass: self.blend_mass,
            correction: self.correction.map(|named| named.0),
            check_layer: self.check_layer,
            gate: GateConfig { on: self.blend_gate, ..GateConfig::default() },
        }
    }

    pub(super) fn check_blending(&self) -> Result<(), Wrong> {
        for (setting, share) in [("ratio", self.ratio), ("monitor_share", self.monitor_share)] {
            if !(0.0..=1.0).contains(&share) {
                return Err((setting, format!("expected 0 to 1, found {share}")));
            }
        }
        if let Some(mass) = self.blend_mass {
            if !(mass > 0.0 && mass <= 1.0) {
                return Err(("blend_mass", format!("expected above 0, up to 1, found {mass}")));
            }
            if !self.blend.0.asks() {
                let problem = format!("expected only with blend answer or question, found with {}", self.blend.0);
                return Err(("blend_mass", problem));
            }
        }
        if !(self.monitor_limit > 0.0 && self.monitor_limit.is_finite()) {
            return Err(("monitor_limit", format!("expected above 0, found {}", self.monitor_limit)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_settings_are_the_engines() {
        assert_eq!(Settings::default().blending(), BlendConfig::default());
        assert_eq!(Settings::default().check_blending(), Ok(()));
    }
}

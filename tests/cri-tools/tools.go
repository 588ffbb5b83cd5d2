//go:build tools

// Pins the CRI test programs; scripts/setup builds them with this module's go.sum.
package tools

import (
	_ "sigs.k8s.io/cri-tools/cmd/crictl"
	_ "sigs.k8s.io/cri-tools/cmd/critest"
)

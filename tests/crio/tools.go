//go:build tools

// Pins a CRI-O that Debian has not; scripts/setup builds it with this module's go.sum.
package tools

import _ "github.com/cri-o/cri-o/cmd/crio"

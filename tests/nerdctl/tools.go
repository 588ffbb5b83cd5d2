//go:build tools

// Pins a nerdctl that Debian has not; scripts/setup builds it.
package tools

import _ "github.com/containerd/nerdctl/v2/cmd/nerdctl"

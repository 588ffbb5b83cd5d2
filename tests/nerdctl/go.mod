module cofferdam/tests/nerdctl

go 1.26.6

require github.com/containerd/nerdctl/v2 v2.2.0

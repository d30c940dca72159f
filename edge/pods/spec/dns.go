package spec

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// What a resolv.conf of a pod may have at most.
const (
	maxNameservers = 3
	maxSearches    = 32
	maxSearchChars = 2048
)

// Resolv is a resolv.conf.
type Resolv struct {
	Nameservers, Searches, Options []string
}

// ParseResolvConf reads a resolv.conf: nameservers add up, of several search lines
// the last one counts, an option given again replaces the earlier one.
func ParseResolvConf(text string) (*Resolv, error) {
	r := &Resolv{}
	at := map[string]int{} // option → index
	var err error
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) == 0 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		switch fields[0] {
		case "nameserver":
			if len(fields) < 2 {
				err = errors.New("resolv.conf: nameserver without an address")
				continue
			}
			r.Nameservers = append(r.Nameservers, fields[1])
		case "search":
			r.Searches = nil
			for _, s := range fields[1:] {
				if s != "." {
					r.Searches = append(r.Searches, strings.TrimSuffix(s, "."))
				}
			}
		case "options":
			for _, o := range fields[1:] {
				name, _, _ := strings.Cut(o, ":")
				if i, ok := at[name]; ok {
					r.Options[i] = o
					continue
				}
				at[name] = len(r.Options)
				r.Options = append(r.Options, o)
			}
		}
	}
	if err != nil {
		return nil, err
	}
	return r, nil
}

// DNS makes the pod's resolv.conf from its dnsPolicy and dnsConfig, and says what
// was left out or done in another way, as events DNSConfigForming and
// MissingClusterDNS.
func DNS(pod *corev1.Pod, node *Node) (*runtimeapi.DNSConfig, []Event) {
	var events []Event
	dns := &runtimeapi.DNSConfig{}
	policy := pod.Spec.DNSPolicy
	cluster := policy != corev1.DNSDefault && policy != corev1.DNSNone && (policy != corev1.DNSClusterFirst || !pod.Spec.HostNetwork)
	if cluster && len(node.ClusterDNS) == 0 {
		cluster, policy = false, corev1.DNSDefault
		events = append(events, Event{"MissingClusterDNS", fmt.Sprintf("pod: %q. kubelet does not have ClusterDNS IP configured and cannot create Pod using %q policy. Falling back to %q policy.",
			describe(pod), corev1.DNSClusterFirst, corev1.DNSDefault)})
	}
	host := node.Resolv
	switch {
	case cluster:
		dns.Servers = slices.Clone(node.ClusterDNS)
		dns.Options = []string{"ndots:5"}
		if d := node.ClusterDomain; d != "" {
			dns.Searches = []string{pod.Namespace + ".svc." + d, "svc." + d, d}
		}
		if host != nil {
			dns.Searches = unique(append(dns.Searches, host.Searches...))
		}
	case policy == corev1.DNSNone:
	case host != nil:
		dns.Servers, dns.Searches, dns.Options = slices.Clone(host.Nameservers), slices.Clone(host.Searches), slices.Clone(host.Options)
	default:
		// No resolv.conf: name servers on the node itself, and no search.
		for _, s := range node.HostIPs {
			local := "127.0.0.1"
			if ip, err := netip.ParseAddr(s); err == nil && ip.Is6() && !ip.Is4In6() {
				local = "::1"
			}
			dns.Servers = append(dns.Servers, local)
		}
		if len(dns.Servers) == 0 {
			dns.Servers = []string{"127.0.0.1"}
		}
		dns.Searches = []string{"."}
	}
	if c := pod.Spec.DNSConfig; c != nil {
		dns.Servers = unique(append(dns.Servers, c.Nameservers...))
		dns.Searches = unique(append(dns.Searches, c.Searches...))
		for _, o := range c.Options {
			option := o.Name
			if o.Value != nil && *o.Value != "" {
				option += ":" + *o.Value
			}
			dns.Options = setOption(dns.Options, option)
		}
	}
	if len(dns.Servers) > maxNameservers {
		dns.Servers = dns.Servers[:maxNameservers]
		events = append(events, Event{"DNSConfigForming",
			"Nameserver limits were exceeded, some nameservers have been omitted, the applied nameserver line is: " + strings.Join(dns.Servers, " ")})
	}
	if fit := fitSearches(dns.Searches); len(fit) < len(dns.Searches) {
		dns.Searches = fit
		events = append(events, Event{"DNSConfigForming",
			"Search Line limits were exceeded, some search paths have been omitted, the applied search line is: " + strings.Join(fit, " ")})
	}
	return dns, events
}

// setOption adds an option such as ndots:5, or replaces the one of its name.
func setOption(options []string, option string) []string {
	name, _, _ := strings.Cut(option, ":")
	for i, o := range options {
		if n, _, _ := strings.Cut(o, ":"); n == name {
			options[i] = option
			return options
		}
	}
	return append(options, option)
}

// fitSearches leaves out what is too much for resolvers: glibc 2.28 aborts on a
// path of more than 255 characters.
func fitSearches(searches []string) []string {
	var fit []string
	for _, s := range searches[:min(len(searches), maxSearches)] {
		if len(s) <= validation.DNS1123SubdomainMaxLength {
			fit = append(fit, s)
		}
	}
	for len(strings.Join(fit, " ")) > maxSearchChars {
		fit = fit[:len(fit)-1]
	}
	return fit
}

func unique(list []string) []string {
	var out []string
	for _, s := range list {
		if !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return out
}

// maxHostname is what fits into the kernel's host name, maxFQDN with a domain.
const (
	maxHostname = 63
	maxFQDN     = 64
)

// Hostname gives the pod's host name, at most 63 characters, and its domain below
// the cluster's, "" where it has none.
func Hostname(pod *corev1.Pod, node *Node) (host, domain string, err error) {
	host = pod.Name
	switch {
	case pod.Spec.HostnameOverride != nil:
		host = *pod.Spec.HostnameOverride
		if msgs := validation.IsDNS1123Subdomain(host); len(msgs) != 0 {
			return "", "", fmt.Errorf("pod HostnameOverride %q is not a valid DNS subdomain: %s", host, strings.Join(msgs, ";"))
		}
	case pod.Spec.Hostname != "":
		host = pod.Spec.Hostname
		if msgs := validation.IsDNS1123Label(host); len(msgs) != 0 {
			return "", "", fmt.Errorf("pod Hostname %q is not a valid DNS label: %s", host, strings.Join(msgs, ";"))
		}
	}
	if len(host) > maxHostname {
		cut := strings.TrimRight(host[:maxHostname], "-.")
		if cut == "" {
			return "", "", fmt.Errorf("hostname for pod %q was invalid: %q", pod.Name, host)
		}
		host = cut
	}
	if sub := pod.Spec.Subdomain; sub != "" && pod.Spec.HostnameOverride == nil {
		if msgs := validation.IsDNS1123Label(sub); len(msgs) != 0 {
			return "", "", fmt.Errorf("pod Subdomain %q is not a valid DNS label: %s", sub, strings.Join(msgs, ";"))
		}
		domain = sub + "." + pod.Namespace + ".svc." + node.ClusterDomain
	}
	return host, domain, nil
}

// kernelHostname is what the sandbox's UTS namespace gets.
func kernelHostname(pod *corev1.Pod, node *Node) (string, error) {
	host, domain, err := Hostname(pod, node)
	if err != nil || domain == "" || !isTrue(pod.Spec.SetHostnameAsFQDN) {
		return host, err
	}
	fqdn := host + "." + domain
	if len(fqdn) > maxFQDN {
		return "", fmt.Errorf("failed to construct FQDN from pod hostname and cluster domain, FQDN %s is too long (%d characters is the max, %d characters requested)", fqdn, maxFQDN, len(fqdn))
	}
	return fqdn, nil
}

package node

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// ParseIPs reads --node-ip: one address, or one of each family with a comma
// between, the primary one first. 0.0.0.0 and :: leave the choice to the node, but
// not the family. Empty is neither.
func ParseIPs(s string) ([]netip.Addr, error) {
	if s == "" {
		return nil, nil
	}
	var ips []netip.Addr
	for part := range strings.SplitSeq(s, ",") {
		ip, err := netip.ParseAddr(strings.TrimSpace(part))
		if err != nil {
			return nil, fmt.Errorf("--node-ip %q: want an IP address such as 192.0.2.7: %w", s, err)
		}
		ip = ip.Unmap()
		switch {
		case ip.IsLoopback(), ip.IsMulticast(), ip.IsLinkLocalUnicast():
			return nil, fmt.Errorf("--node-ip %s: a loopback, multicast or link-local address is of no use to others", ip)
		case len(ips) == 2, len(ips) == 1 && (ips[0].Is4() == ip.Is4() || ips[0].IsUnspecified() || ip.IsUnspecified()):
			return nil, fmt.Errorf("--node-ip %q: want one address, or one of IPv4 and one of IPv6", s)
		}
		ips = append(ips, ip)
	}
	return ips, nil
}

// Addresses are the node's: InternalIP and Hostname. want are those of --node-ip,
// which must be the host's. Without them it is the address of the interface with
// the default route, else the first global one; no name server is asked. A host
// without an address has its name alone.
func Addresses(hostname string, want []netip.Addr) ([]corev1.NodeAddress, error) {
	var ips []netip.Addr
	var err error
	switch {
	case len(want) > 0 && !want[0].IsUnspecified():
		for _, ip := range want {
			if !onHost(ip) {
				err = errors.Join(err, fmt.Errorf("node IP %s is on no interface of the host", ip))
			}
		}
		ips = want
	default:
		prefer := []func(netip.Addr) bool{netip.Addr.Is4, netip.Addr.Is6}
		if len(want) > 0 && want[0].Is6() {
			prefer[0], prefer[1] = prefer[1], prefer[0]
		}
		for _, family := range prefer {
			if ip := address(family); ip.IsValid() {
				ips = append(ips, ip)
				break
			}
		}
	}
	var out []corev1.NodeAddress
	for _, ip := range ips {
		out = append(out, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: ip.String()})
	}
	return append(out, corev1.NodeAddress{Type: corev1.NodeHostName, Address: hostname}), err
}

func onHost(ip netip.Addr) bool {
	as, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	for _, a := range as {
		if n, ok := a.(*net.IPNet); ok && n.IP.Equal(ip.AsSlice()) {
			return true
		}
	}
	return false
}

// address is the first global address of a family: of the interface with the
// default route, else of any that is up.
func address(family func(netip.Addr) bool) netip.Addr {
	ifs, err := net.Interfaces()
	if err != nil {
		return netip.Addr{}
	}
	var all []ifAddr
	for _, i := range ifs {
		if i.Flags&(net.FlagUp|net.FlagLoopback) != net.FlagUp {
			continue
		}
		as, err := i.Addrs()
		if err != nil {
			continue
		}
		for _, a := range as {
			if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
				ip, _ := netip.AddrFromSlice(n.IP)
				all = append(all, ifAddr{i.Name, ip.Unmap()})
			}
		}
	}
	return pick(all, family, defaultRoute(family(netip.IPv4Unspecified())))
}

type ifAddr struct {
	name string
	ip   netip.Addr
}

func pick(all []ifAddr, family func(netip.Addr) bool, route string) (found netip.Addr) {
	for _, a := range all {
		switch {
		case !family(a.ip):
		case a.name == route:
			return a.ip
		case !found.IsValid():
			found = a.ip
		}
	}
	return found
}

// defaultRoute is the interface of the default route with the lowest metric; empty
// if there is none.
func defaultRoute(v4 bool) string {
	file, name, dest, metric, flags, base := "/proc/net/ipv6_route", 9, 0, 5, 8, 16
	zero := strings.Repeat("0", 32)
	if v4 {
		file, name, dest, metric, flags, base = "/proc/net/route", 0, 1, 6, 3, 10
		zero = "00000000"
	}
	f, err := os.Open(file)
	if err != nil {
		return ""
	}
	defer func() { _ = f.Close() }()
	const up, reject = 0x1, 0x200
	best, lowest := "", uint64(1<<63)
	for s := bufio.NewScanner(f); s.Scan(); {
		l := strings.Fields(s.Text())
		if len(l) < 8 || len(l) <= name || l[dest] != zero || !v4 && l[1] != "00" || v4 && l[7] != zero {
			continue
		}
		fl, err1 := strconv.ParseUint(l[flags], 16, 32)
		m, err2 := strconv.ParseUint(l[metric], base, 32)
		if err1 != nil || err2 != nil || fl&up == 0 || fl&reject != 0 || l[name] == "lo" || m >= lowest {
			continue
		}
		best, lowest = l[name], m
	}
	return best
}

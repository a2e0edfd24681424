package device

import (
	"context"
	"net"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// The device is read this often for what is to be remembered, and while a
	// key is staged this often for its handshake,
	readEvery  = 2 * time.Second
	watchEvery = 250 * time.Millisecond
	// but never so that it takes more than this part of a processor.
	readShare = 20
)

// watch reads the device between turns: for the memory, and for the handshakes of
// next keys.
func (d *Device) watch(ctx context.Context) {
	timer := time.NewTimer(readEvery)
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.wake:
			timer.Reset(watchEvery)
			continue
		case <-timer.C:
		}
		begin := time.Now()
		if err := d.look(); err != nil {
			d.log.Debug("device not read", "error", err) // the caller's next turn says so
		}
		took := time.Since(begin)
		d.mu.Lock()
		pause := readEvery
		if len(d.staged) > 0 {
			pause = watchEvery
		}
		d.mu.Unlock()
		timer.Reset(max(pause, readShare*took))
	}
}

// watchLink tells when another hand takes the interface away or down.
func (d *Device) watchLink(ctx context.Context) {
	index, up := 0, false
	is := func(link netlink.Link, there bool) {
		before := up
		up = there && link.Attrs().Flags&net.FlagUp != 0
		if up {
			index = link.Attrs().Index
		} else if before && ctx.Err() == nil {
			go d.options.Lost()
		}
	}
	for ctx.Err() == nil {
		updates, stop := make(chan netlink.LinkUpdate), make(chan struct{})
		if err := netlink.LinkSubscribe(updates, stop); err != nil {
			d.log.Debug("interface not watched", "error", err) // the caller looks by itself, later
		} else {
			if link, err := linkByName(d.options.Name); err == nil {
				is(link, link != nil)
			}
			for open := true; open; {
				select {
				case <-ctx.Done():
					open = false
				case u, ok := <-updates:
					if open = ok; !ok {
						break
					}
					// Others may be of that name in a bridge's own tables.
					ours := u.Attrs().Name == d.options.Name
					if u.Family == unix.AF_UNSPEC && (ours || u.Attrs().Index == index) {
						is(u, ours && u.Header.Type == unix.RTM_NEWLINK)
					}
				}
			}
			close(stop)
			go func() {
				for range updates { // what the library still has to say
				}
			}()
		}
		select {
		case <-ctx.Done():
		case <-time.After(readEvery):
		}
	}
}

// look is one turn of watch.
func (d *Device) look() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, err := d.read()
	if err == nil {
		var c Changes
		for next, p := range d.staged {
			if r := d.memory.keys[next]; r == nil || r.Handshake.IsZero() {
				continue
			}
			successor := p.successor()
			successor.AllowedIPs = canonical(successor.AllowedIPs)
			c.Rotated = append(c.Rotated, Rotation{p.Name, p.PublicKey, next})
			c.Remove = append(c.Remove, Removal{p.Name, p.PublicKey})
			c.Update = append(c.Update, Update{
				Name: p.Name, Key: next, Keepalive: &successor.Keepalive,
				IPs: successor.AllowedIPs, AddIPs: successor.AllowedIPs,
			})
		}
		if len(c.Rotated) > 0 {
			c.sort()
			err = d.apply(c)
		}
	}
	d.memory.keep()
	return err
}
